"""`Learner`: one rank of a learner group, as a Ray actor. Policy, value model and discriminator share the class.

Invariant: `LearnerGroup` makes calls that are collective under sharding (forward passes, steps, gathering weights, checkpoints)
on all ranks in the same order.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import ray
import torch

from rlhf_ray.batch import Batch, ModelInput, pack_sequences
from rlhf_ray.config.algorithm import AlgorithmConfig
from rlhf_ray.config.learner import LearnerConfig
from rlhf_ray.config.teacher import TeacherConfig
from rlhf_ray.learner import deepspeed_engine
from rlhf_ray.learner.objectives import Objective, discriminator_objective, policy_objective, value_objective
from rlhf_ray.learner.sharded_model import ShardedModel, StepResult
from rlhf_ray.learner.teacher import FrozenTeacher, load_teacher
from rlhf_ray.models.heads import SequenceScores, TokenLogprobs, TokenValues
from rlhf_ray.models.loading import Dtype, load_causal_lm, load_reward_model, load_scalar_model
from rlhf_ray.models.lora import without_adapters
from rlhf_ray.models.reward_heads import RewardHeads
from rlhf_ray.roles import ROLES
from rlhf_ray.runs.storage.folders import Manifest, fetch
from rlhf_ray.runs.storage.location import local
from rlhf_ray.runs.storage.rank_files import fetch_rank_files, upload_rank_files, working_root_id
from rlhf_ray.weights.bucket import WeightBucket, pack
from rlhf_ray.weights.native import NativeSender, TransferPlan


@dataclass(frozen=True)
class LearnerSpec:
    """The specification of a learner, the same for all ranks."""

    role: str
    """The name of a learner's role in `roles.ROLES`."""
    model: str
    """The Hugging Face folder that training starts from."""
    config: LearnerConfig
    algorithm: AlgorithmConfig
    temperature: float = 1.0
    """Sampling temperature. The policy's log-probabilities use the same temperature."""
    sync_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights that rollout workers receive."""
    seed: int = 0
    """The seed of a new head or of adapters."""
    sync_adapters: bool = False
    """Rollout workers hold the base model and receive the adapters only."""
    teacher: TeacherConfig | None = None
    """The teacher of the policy with `mode: full_vocabulary`. Its `model` is a folder."""
    smoothing: float = 0.0
    """Label smoothing of a discriminator."""


class Learner:
    """One rank with its share of the model, of every batch and of the optimizer."""

    def __init__(self, spec: LearnerSpec, rank: int, world_size: int) -> None:
        teacher = spec.teacher and spec.teacher.model_copy(update={"model": fetch(spec.teacher.model)})
        self.spec = replace(spec, model=fetch(spec.model), teacher=teacher)
        self.kind: LearnerModel = ROLES[spec.role].load("model")
        self.rank, self.world_size = rank, world_size
        self.use_gpu = spec.config.workers.gpus > 0
        self.teacher: FrozenTeacher | None = None
        deepspeed_engine.prepare_process(spec.config.workers.threads, self.use_gpu)

    def rendezvous(self) -> tuple[str, int]:
        """This node's address and a free port for the group's torch.distributed world. Called on rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master: str, port: int) -> None:
        """Join the group, load the model and shard it."""
        deepspeed_engine.join_group(self.rank, self.world_size, master, port, self.use_gpu)
        wrapped = deepspeed_engine.build(self._load, self.spec.config, self.spec.seed)
        self.model = ShardedModel(wrapped, self.spec.config, self.rank, self.world_size)
        if self.spec.teacher is not None:
            self.teacher = load_teacher(self.spec.teacher, self.spec.config, self.model.device)

    def evaluate(self, batch: Batch, micro_batches: list[np.ndarray], base: bool = False) -> np.ndarray:
        """Evaluate the targets in the order of the micro-batches: float32 [M] (see `LearnerGroup.evaluate`).

        Args:
            base: evaluate the model without its adapters.
        """
        with without_adapters(self.model.hf_model) if base else nullcontext():
            return self.model.evaluate(batch, micro_batches, self.kind.output)

    def update(self, batch: Batch, micro_batches: list[np.ndarray], learning_rate: float, beta: float) -> StepResult:
        """Take one optimizer step on this rank's share of a minibatch. `beta` is the coefficient of a KL term in the loss."""
        return self.model.step(batch, micro_batches, self.kind.objective(self.spec, beta, self.teacher), learning_rate)

    def probe_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """Log-probabilities of tokens 1… of one sequence at temperature 1: float32 [T−1]."""
        mask = np.arange(len(token_ids)) > 0
        batch = pack_sequences([token_ids], [mask])
        policy = self.model.engine.module
        temperature, policy.temperature = policy.temperature, 1.0
        try:
            return self.model.evaluate(batch, [np.zeros(1, dtype=np.int64)], self.kind.output)
        finally:
            policy.temperature = temperature

    def weight_buckets(self, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Stream the weights. Rank 0 yields them; the other ranks take part in gathering and yield nothing."""
        weights = self._weights_to_sync(bucket_bytes)
        if self.rank == 0:
            yield from pack(weights, bucket_bytes)
        else:
            for _ in weights:
                pass

    def connect_weight_transfer(self, plan: TransferPlan) -> None:
        """Connect to the rollout workers by vLLM's transfer engines (GPUs only). Called on all ranks at the same time."""
        dtype = getattr(torch, self.spec.sync_dtype)
        metadata = [(name, dtype, shape) for name, shape in self.model.weight_shapes()]
        self.sender = NativeSender(plan, self.rank, metadata, lambda: self._weights_to_sync(plan.bucket_bytes))

    def send_weights(self, version: int) -> None:
        """Send the weights to the connected workers. Called on all ranks at the same time."""
        self.sender.send(version)

    def save_checkpoint(self, folder: str, steps: int) -> None:
        """Write this rank's share of weights and optimizer state in DeepSpeed's format. `folder` is a path or a reference."""
        self.model.save_state(str(local(folder)), {"steps": steps})

    def load_checkpoint(self, folder: str) -> int:
        """Read this rank's share; returns its number of optimizer steps."""
        return int(self.model.load_state(str(fetch_rank_files(folder, self.rank)))["steps"])

    def save_pretrained(self, folder: str) -> None:
        """Write the model as a Hugging Face folder on rank 0; all ranks gather."""
        local(folder).parent.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(local(folder), tokenizer_from=self.spec.model)

    def working_root_id(self) -> str:
        """Identifies the working folders that this rank sees."""
        return working_root_id()

    def upload_rank_files(self, folder: str) -> Manifest:
        """Move the files that the ranks of this node wrote below a reference to the store."""
        return upload_rank_files(folder)

    def pid(self) -> int:
        """The process id, for fault tests."""
        return os.getpid()

    def _weights_to_sync(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = getattr(torch, self.spec.sync_dtype)
        read = self.model.named_adapters if self.spec.sync_adapters else self.model.named_weights
        return ((name, tensor.to(dtype)) for name, tensor in read(bucket_bytes))

    def _load(self) -> torch.nn.Module:
        dtype: Dtype = "bf16" if self.spec.config.precision == "bf16" else "fp32"
        return self.kind.load(self.spec, dtype)


@dataclass(frozen=True)
class LearnerModel:
    """What differs between the learners of different roles. `roles.ROLES` names one for each."""

    load: Callable[[LearnerSpec, Dtype], torch.nn.Module]
    """Loads the trained module."""
    objective: Callable[[LearnerSpec, float, FrozenTeacher | None], Objective]
    """The loss for a KL coefficient and a teacher of the whole vocabulary."""
    output: Callable[[torch.nn.Module, ModelInput], torch.Tensor]
    """What `evaluate` returns for the targets of a micro-batch."""


POLICY = LearnerModel(
    lambda spec, dtype: TokenLogprobs(load_causal_lm(spec.model, dtype, spec.config.attention), spec.temperature),
    lambda spec, beta, teacher: policy_objective(spec.algorithm, beta, teacher),
    lambda model, inputs: model(inputs)[0],
)
VALUE = LearnerModel(
    lambda spec, dtype: TokenValues(load_scalar_model(spec.model, dtype, spec.config.attention, spec.seed)),
    lambda spec, beta, teacher: value_objective(spec.algorithm),
    lambda model, inputs: model(inputs),
)
DISCRIMINATOR = LearnerModel(
    # A new head is as small as a reward model's, so the first scores are close to 0.
    lambda spec, dtype: SequenceScores(
        load_reward_model(spec.model, RewardHeads({"reward": 1.0}), dtype, spec.config.attention, spec.seed)
    ),
    lambda spec, beta, teacher: discriminator_objective(spec.smoothing),
    lambda model, inputs: model(inputs)[:, 0],
)
