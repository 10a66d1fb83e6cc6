"""How many processes a run has, and where. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from pmod_cli.core.errors import PmodError


@dataclass(frozen=True)
class Distributed:
    """The processes of a run.

    Args:
        processes: on all machines together; one a GPU.
        machines: each is given the same command, but for ``machine_rank``.
        machine_rank: number of this machine, from 0.
        main_ip: address of machine 0.
        main_port: free port of machine 0.
        accelerate_config: a file that ``accelerate config`` wrote; it then says all of this, and the engine.

    Raises:
        PmodError: numbers that do not fit each other.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_ip: str | None = None
    main_port: int = 29500
    accelerate_config: Path | None = None

    def __post_init__(self) -> None:
        if self.processes % self.machines:
            raise PmodError(
                f"`num_processes={self.processes}` counts those of all machines: expected a multiple of "
                f"`num_machines={self.machines}`"
            )
        if self.machine_rank >= self.machines:
            raise PmodError(f"`machine_rank={self.machine_rank}`: expected less than `num_machines={self.machines}`")
        if self.machines > 1 and self.main_ip is None:
            raise PmodError("`num_machines` needs `main_process_ip`, the address of machine 0")
        if self.accelerate_config is not None and not self.accelerate_config.is_file():
            raise PmodError(f"no such file: {self.accelerate_config}", hint="accelerate config --config_file FILE")

    @property
    def is_launch(self) -> bool:
        """Whether a launcher is needed."""
        return self.processes > 1 or self.accelerate_config is not None

    @property
    def here(self) -> int:
        """Processes of this machine."""
        return self.processes // self.machines
