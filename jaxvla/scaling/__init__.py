"""Performance without the machine: emulated stages under the real schedule."""
