"""Which policy server answers which env group. No jax.

round_robin     group i has server i mod num_servers
greedy          at the start of every segment, the server with the fewest rows registered
0,1,1           the server of every group, in order
"""

import math
import re
from collections import Counter

from jaxvla.config import ConfigError, ExperimentConfig, override
from jaxvla.layout import LayoutError, RoleLayout

GREEDY = "greedy"
ROUND_ROBIN = "round_robin"


class AssignmentError(ValueError):
    """The assignment is malformed or does not fit the groups and servers."""


def parse_assignment(text: str, *, num_groups: int, num_servers: int) -> tuple[int, ...] | None:
    """Server index by env group; None when it is decided anew for every segment (greedy).

    Args:
      text: see the module docstring.
      num_groups: env groups.
      num_servers: policy servers, at most as many.

    Raises:
      AssignmentError: malformed; another number of groups; a server that does not exist, or
        one that would have nothing to do.
    """
    if text == GREEDY:
        return None
    if text == ROUND_ROBIN:
        return tuple(group % num_servers for group in range(num_groups))
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise AssignmentError(f"must be {ROUND_ROBIN}, {GREEDY} or servers such as 0,1,1")
    servers = tuple(int(part) for part in text.split(","))
    if len(servers) != num_groups:
        raise AssignmentError(f"must name the server of each of the {num_groups} env groups")
    if set(servers) != set(range(num_servers)):
        raise AssignmentError(f"must name every server from 0 to {num_servers - 1}, and no other")
    return servers


def most_groups(text: str, *, num_groups: int, num_servers: int) -> int:
    """Env groups that one server may have at a time; raises as `parse_assignment`.

    Round-robin and greedy never go above the rounded-up mean: greedy gives a group to a server
    that has the fewest, hence less than the mean.
    """
    if text in (ROUND_ROBIN, GREEDY):
        return math.ceil(num_groups / num_servers)
    servers = parse_assignment(text, num_groups=num_groups, num_servers=num_servers)
    return max(Counter(servers).values())


def validate_servers(config: ExperimentConfig, where: RoleLayout) -> int:
    """Checks how many policy servers there are, for whom, and on which devices.

    Args:
      config: the run's.
      where: layout of the serving role.

    Returns:
      Env groups that one server may have at a time.

    Raises:
      ConfigError: a setting cannot work.
    """
    serving, groups = config.serving, config.simulation.num_groups
    if serving.num_servers > groups:
        allowed = f"must be <= simulation.num_groups = {groups}, or some have nothing to do"
        raise _error("num_servers", serving.num_servers, allowed, groups)
    try:
        most = most_groups(serving.assignment, num_groups=groups, num_servers=serving.num_servers)
    except AssignmentError as error:
        raise _error("assignment", serving.assignment, str(error), ROUND_ROBIN) from error
    if serving.split_devices:
        try:
            where.split(serving.num_servers)
        except LayoutError as error:
            allowed = f"{error} for serving.num_servers = {serving.num_servers}"
            raise _error("split_devices", True, allowed, False) from error
    return most


def _error(name: str, value: object, allowed: str, fix: object) -> ConfigError:
    name = f"serving.{name}"
    return ConfigError(name, value, allowed, override(name, fix))
