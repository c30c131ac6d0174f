"""What all sections of the config share: strict types, no unknown keys, immutable values, documented fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator


class Section(BaseModel):
    """Base of all sections. The docstring of a field is its documentation; `rlhf-ray config docs` prints it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


IMPORT_PATH_SCHEMA = {"type": "string", "examples": ["package.module:name"], "pattern": "^[^:]+:[^:]+$"}


def _module_and_name(value: str) -> str:
    module, _, name = value.partition(":")
    if not module or not name:
        raise ValueError(f"{value!r} is not of the form package.module:name")
    return value


ImportPath = Annotated[str, AfterValidator(_module_and_name), WithJsonSchema(IMPORT_PATH_SCHEMA)]
"""The name of a Python object of the user's own."""


def micro_batch_budget(section: dict[str, Any]) -> int:
    """Default of `micro_batch_tokens` in a section with `workers`: as much as a CPU's cache holds, or enough for a GPU."""
    workers: Workers | None = section.get("workers")
    return 8192 if workers and workers.gpus > 0 else 1024


def check_packing(packing: bool, attention: str) -> None:
    """Raises ValueError if the attention kernel of a section does not separate packed sequences."""
    if packing and attention == "eager":
        raise ValueError("attention eager would attend across packed sequences; set packing: false, or use sdpa")


class Workers(Section):
    """The actors of one role. Every role has its own size."""

    count: int = Field(1, ge=1)
    """Number of actors. For a learner: data-parallel ranks."""
    cpus: float = Field(0.25, ge=0)
    """Ray CPUs that each actor reserves. Ray uses them for scheduling only, they are not a limit; see `threads`."""
    gpus: float = Field(0.0, ge=0)
    """GPUs that each actor reserves. A fraction shares a GPU with the actors of `ppo.placement.colocate`."""
    threads: int = Field(1, ge=1)
    """OpenMP threads of each actor, which is the CPU time it really uses. Roles work at the same time, and threads that wait
    for each other cost a small model more than they give: raise `count` first, then `threads`."""
    busy_wait: bool = False
    """On a CPU: threads of an actor wait for each other by spinning instead of sleeping. Up to 3 times faster if the actor
    has `threads` cores to itself while it works, and many times slower if it shares them. No effect with a single thread."""
    resources: dict[str, float] = {}
    """Custom Ray resources that each actor reserves, such as `{"rollout_node": 1}`, to place a role on certain nodes."""
    env: dict[str, str] = {}
    """Environment variables of each actor's process."""

    @property
    def process_environment(self) -> dict[str, str]:
        """Variables that must be set before an actor loads OpenMP. `env` overrides them."""
        waiting = {} if self.busy_wait else {"OMP_WAIT_POLICY": "passive"}
        return {"OMP_NUM_THREADS": str(self.threads), **waiting, **self.env}

    @field_validator("env")
    @classmethod
    def _real_values(cls, env: dict[str, str]) -> dict[str, str]:
        dumped = [name for name, value in env.items() if value == "<not shown>"]
        if dumped:
            raise ValueError(f"{', '.join(dumped)}: a dumped config does not contain environment values; fill them in")
        return env

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> Workers:
        if self.gpus > 1 and not float(self.gpus).is_integer():
            raise ValueError(f"gpus is {self.gpus}; use a whole number above 1, or any fraction below 1")
        return self
