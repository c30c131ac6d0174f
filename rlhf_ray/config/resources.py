"""How many actors a role has and what each of them asks Ray for."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.base import Section


class Workers(Section):
    """A role's actors. Every role is sized on its own."""

    count: int = Field(1, ge=1)
    """Number of actors (for a learner: data-parallel ranks)."""
    cpus: float = Field(0.25, ge=0)
    """Ray CPUs that each actor reserves. Bookkeeping for the scheduler, not a limit; see `threads`."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that each actor reserves; a fraction shares a GPU with the actors of `ppo.placement.colocate`."""
    threads: int = Field(2, ge=1)
    """OpenMP threads of each actor: what it really uses of the CPU."""
    resources: dict[str, float] = {}
    """Custom Ray resources that each actor reserves, e.g. `{"rollout_node": 1}`, to pin a role to some nodes."""
    env: dict[str, str] = {}
    """Environment variables of each actor's process."""

    @field_validator("env")
    @classmethod
    def _real_values(cls, env: dict[str, str]) -> dict[str, str]:
        dumped = [name for name, value in env.items() if value == "<not shown>"]
        if dumped:
            raise ValueError(f"{', '.join(dumped)}: a dumped config leaves environment values out; fill them in")
        return env

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> Workers:
        if self.gpus > 1 and not float(self.gpus).is_integer():
            raise ValueError(f"gpus is {self.gpus}; above 1 only whole GPUs can be reserved, below 1 any fraction")
        return self
