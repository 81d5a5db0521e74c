"""Training and judging networks: heal, evaluate, distillation, and checkpoints that a killed run goes on from."""

from palmette.train.checkpoint import load_checkpoint, save_checkpoint
from palmette.train.config import HealConfig
from palmette.train.distill import distillation_loss
from palmette.train.evaluate import Evaluation, evaluate
from palmette.train.fade import heal_fading
from palmette.train.loop import heal, healed

__all__ = [
    "Evaluation",
    "HealConfig",
    "distillation_loss",
    "evaluate",
    "heal",
    "heal_fading",
    "healed",
    "load_checkpoint",
    "save_checkpoint",
]
