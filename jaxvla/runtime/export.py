"""The export job: a stored policy as a checkpoint that openpi loads."""

import pathlib

import jax

from jaxvla.config import UsageError
from jaxvla.models.openpi_format import require_writable, save_checkpoint
from jaxvla.runtime.build import Blueprint, Parts
from jaxvla.runtime.evaluate import stored_policy
from jaxvla.telemetry.progress import Screen

EXIT_FINISHED = 0


def check_export(blueprint: Blueprint, directory: pathlib.Path, asset_id: str) -> None:
    """Refuses what cannot be exported, see `require_writable`."""
    try:
        require_writable(directory, blueprint.params_struct(), asset_id)
    except UsageError as error:
        raise UsageError(f"--job=export: {error}") from error


def export(
    blueprint: Blueprint,
    workdir: pathlib.Path,
    directory: pathlib.Path,
    asset_id: str,
    screen: Screen,
) -> int:
    """Writes params/ and assets/; returns the exit code of the contract.

    Args:
      blueprint: of the run.
      workdir: of the run.
      directory: to be made.
      asset_id: name of the data set whose statistics the policy has.
      screen: where to show.

    Raises:
      UsageError: see `save_checkpoint`, or there is no checkpoint.
    """
    stored = stored_policy(Parts(blueprint), workdir)
    if stored is None:
        raise UsageError(f"--workdir={workdir}: holds no complete checkpoint. Fix: train first")
    with screen.phase(f"export update {stored.update}"):
        save_checkpoint(directory, stored.params, stats=blueprint.stats, asset_id=asset_id)
    count = sum(leaf.size for leaf in jax.tree.leaves(stored.params))
    screen.message(f"{count:,} parameters in {directory}, statistics of {asset_id}")
    return EXIT_FINISHED
