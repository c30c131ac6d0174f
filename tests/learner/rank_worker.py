"""One rank as a Ray actor that can train under several ZeRO stages in turn, with the production engine, model and objective."""

from __future__ import annotations

import socket

import numpy as np
from torch import nn

from rlhf_ray.batch import Batch
from rlhf_ray.config.algorithm import AlgorithmConfig, KLConfig
from rlhf_ray.config.learner import LearnerConfig, LoraConfig, OptimizerConfig, ShardingConfig
from rlhf_ray.config.supervised import RewardModelConfig
from rlhf_ray.learner import deepspeed_engine
from rlhf_ray.learner.objectives import Objective, discriminator_objective, policy_objective
from rlhf_ray.learner.reward_objectives import RewardObjective
from rlhf_ray.learner.sharded_model import ShardedModel
from rlhf_ray.micro_batches import plan_micro_batches
from rlhf_ray.models.heads import SequenceScores, TokenLogprobs
from rlhf_ray.models.loading import load_causal_lm, load_reward_model
from rlhf_ray.models.reward_heads import RewardHeads

HEADS = RewardHeads({"reward": 1.0}, ("cooks", "guests"))
ALGORITHM = AlgorithmConfig(kl=KLConfig(placement="loss", estimator="k3", coefficient=0.1))


class RankWorker:
    """Rank `rank` of `world`."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.algorithm = rank, world, ALGORITHM
        deepspeed_engine.prepare_process(1, use_gpu=False)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def join(self, port: int) -> None:
        deepspeed_engine.join_group(self.rank, self.world, "127.0.0.1", port, use_gpu=False)

    def load(self, model: str) -> nn.Module:
        return TokenLogprobs(load_causal_lm(model))

    def use(self, algorithm: AlgorithmConfig) -> None:
        """Use this setting for the next training."""
        self.algorithm = algorithm

    def objective(self) -> Objective:
        return policy_objective(self.algorithm, 0.1)

    def train(
        self,
        model: str,
        stage: int,
        batch: Batch,
        budget: int,
        steps: int,
        max_grad_norm: float = 1e9,
        packing: bool = False,
        lora: LoraConfig | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float], list[float]]:
        """(gradients of the first step, parameters after the last, losses, gradient norms)."""
        from deepspeed.utils import safe_get_full_grad

        config = LearnerConfig(
            sharding=ShardingConfig(zero_stage=stage),
            optimizer=OptimizerConfig(learning_rate=1e-3, max_grad_norm=max_grad_norm),
            micro_batch_tokens=budget,
            packing=packing,
            lora=lora,
        )
        wrapped = deepspeed_engine.build(lambda: self.load(model), config)
        learner = ShardedModel(wrapped, config, self.rank, self.world)
        gradients: dict[str, np.ndarray] = {}
        step = wrapped.step

        def recording_step() -> None:
            if not gradients:
                for name, parameter in wrapped.module.named_parameters():
                    if not parameter.requires_grad:
                        continue
                    full = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
                    gradients[name] = full.detach().float().cpu().numpy().copy()
            step()

        wrapped.step = recording_step
        shares = plan_micro_batches(batch.lengths, self.world, budget, batch.element_sizes, packing)
        objective = self.objective()
        results = [learner.step(batch, shares[self.rank], objective, 1e-3) for _ in range(steps)]
        parameters = {name: p.float().cpu().numpy().copy() for name, p in learner.named_weights(1 << 20)}
        return gradients, parameters, [r.loss for r in results], [r.grad_norm for r in results]


class RewardRankWorker(RankWorker):
    """A reward model of two annotator groups instead of a policy."""

    def __init__(self, rank: int, world: int, config: RewardModelConfig) -> None:
        super().__init__(rank, world)
        self.config = config

    def load(self, model: str) -> nn.Module:
        return SequenceScores(load_reward_model(model, HEADS, seed=1))

    def objective(self) -> Objective:
        return RewardObjective(self.config, HEADS)


class DiscriminatorRankWorker(RankWorker):
    """A discriminator instead of a policy."""

    def load(self, model: str) -> nn.Module:
        return SequenceScores(load_reward_model(model, RewardHeads({"reward": 1.0}), seed=1))

    def objective(self) -> Objective:
        return discriminator_objective(0.1)


def ragged_batch(rng: np.random.Generator, vocabulary: int, lengths: list[int], prompt: int = 2) -> Batch:
    """Sequences of very different lengths with the columns of a PPO update; token-mean weights."""
    from rlhf_ray.batch import pack_sequences

    sequences = [rng.integers(3, vocabulary, size=n) for n in lengths]
    batch = pack_sequences(sequences, [np.arange(len(s)) >= prompt for s in sequences])
    count = int(batch.target_mask.sum())
    old = np.full(count, -np.log(vocabulary), dtype=np.float32)
    return batch.with_columns(
        weights=np.full(count, 1 / count, dtype=np.float32),
        advantages=rng.normal(size=count).astype(np.float32),
        reference_logprobs=(old + rng.normal(scale=0.1, size=count)).astype(np.float32),
    )
