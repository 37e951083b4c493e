"""What a rank other than the first does: it trains along, on its share of each step, and writes nothing."""

from __future__ import annotations

import contextlib
import signal
import tempfile
from pathlib import Path

import transformers

from llamanb.data import load_data
from llamanb.errors import DataError, RecipeError
from llamanb.model import attach_adapters, load_model
from llamanb.quiet import quiet_libraries
from llamanb.scale.peers import SERVE, Peers, shared_layers
from llamanb.training.resume import rows_hash
from llamanb.training.step import heaviest
from llamanb.training.trainer import build_trainer, use_threads_that_pay


def follow(ranks: Peers) -> None:
    """Trains as rank 0 tells, until it says that it is over.

    Raises RecipeError where the run's folder cannot be seen from here, and DataError where the rows here are others.
    """
    plan, folder, rows = ranks.told()
    if not folder.is_dir():
        fix = "give runs= a folder on a disk that all machines share"
        raise RecipeError(f"{folder} is not on {ranks.host}", "all ranks read checkpoints from the run's folder", fix)
    data = load_data(plan.recipe)
    if rows_hash(data) != rows:
        fix = "copy the same file to all machines, or name a dataset of the Hub"
        raise DataError(f"the rows on {ranks.host} are not those of rank 0", "their hash differs", fix)
    transformers.set_seed(plan.recipe.seed)
    with quiet_libraries(), tempfile.TemporaryDirectory() as aside:
        model = load_model(plan, data.tokenizer, streams=ranks.streams)
        use_threads_that_pay(model)
        if plan.recipe.adapters:
            model = attach_adapters(model, plan.recipe)
        trainer = build_trainer(plan, model, data, Path(aside), ranks.watchers(), ranks=ranks)
        trainer.probe = heaviest(data.train, plan, fused=trainer.fused is not None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when it is over
        while start := ranks.told():
            if start == SERVE:
                shared_layers(model).serve()
                continue
            checkpoint, trainer.args.learning_rate = start
            trainer.learns, trainer.bad = True, 0
            if trainer.optimizer:
                trainer.optimizer.state.clear()
            with contextlib.suppress(FloatingPointError):  # then rank 0 has seen it too, and says where to go on
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
