"""What every section of a config shares: strict types, no unknown keys, immutable, documented fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections. A field's docstring is its documentation; `rlhf-ray config` prints it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def micro_batch_budget(section: dict[str, Any]) -> int:
    """Default of `micro_batch_tokens` in a section with `workers`: what a CPU's cache holds, or enough to keep a GPU busy."""
    workers: Workers | None = section.get("workers")
    return 8192 if workers and workers.gpus > 0 else 1024


def check_packing(packing: bool, attention: str) -> None:
    """Raises ValueError where the attention kernel of a section cannot keep packed sequences apart."""
    if packing and attention == "eager":
        raise ValueError("attention eager would look across packed sequences; set packing: false, or use sdpa")


class Workers(Section):
    """A role's actors. Every role is sized on its own."""

    count: int = Field(1, ge=1)
    """Number of actors (for a learner: data-parallel ranks)."""
    cpus: float = Field(0.25, ge=0)
    """Ray CPUs that each actor reserves. Bookkeeping for the scheduler, not a limit; see `threads`."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that each actor reserves; a fraction shares a GPU with the actors of `ppo.placement.colocate`."""
    threads: int = Field(1, ge=1)
    """OpenMP threads of each actor: what it really uses of the CPU. Roles work at the same time, and threads that wait for each
    other cost a small model more than they give: first more actors, then more threads."""
    busy_wait: bool = False
    """On a CPU: the actor's threads wait for each other spinning instead of sleeping. Up to 3 times faster where the actor has
    `threads` cores to itself while it works, many times slower where it shares them; without effect on a single thread."""
    resources: dict[str, float] = {}
    """Custom Ray resources that each actor reserves, e.g. `{"rollout_node": 1}`, to pin a role to some nodes."""
    env: dict[str, str] = {}
    """Environment variables of each actor's process."""

    @property
    def process_environment(self) -> dict[str, str]:
        """Variables that must be in an actor's environment before OpenMP is loaded; `env` wins."""
        waiting = {} if self.busy_wait else {"OMP_WAIT_POLICY": "passive"}
        return {"OMP_NUM_THREADS": str(self.threads), **waiting, **self.env}

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
