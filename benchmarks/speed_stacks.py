"""The contestants of `benchmarks.speed`: how each stack makes a model and a trainer of the same shape, in its own
process. Everything but the standard library is imported inside, since each process has packages of its own.

Same for all: token ids drawn by seed in rows of exact length (or of real rows' lengths, in one order), fp16, nf4 with
double quantization, adapters of rank 16 on all linear layers without dropout, paged 8-bit AdamW, the loss divided by
the tokens of the whole optimizer batch (transformers does that), a log line a step. Adapters are trained in fp32.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.speed_rows import EFFECTIVE, MODELS, OPTIMIZER, RANK, drawn

if TYPE_CHECKING:
    from benchmarks.speed_worker import Gpu

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "xformers")
MANY_STEPS = 100_000
"""More than any session trains: it ends when it is told to."""


def installed(*names: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def token_rows(vocabulary: int, session: dict) -> dict[str, list[list[int]]]:
    """`input_ids` and `labels` of the session's rows: the same random token ids for every stack; the last 300 of a
    vocabulary may be special."""
    import numpy as np

    sizes = drawn(session)
    shape = (len(sizes), session["length"])
    ids = np.random.default_rng(0).integers(0, max(16, vocabulary - 300), size=shape).tolist()
    ids = [row[:tokens] for row, (tokens, _) in zip(ids, sizes, strict=True)]
    ends = [tokens - trained for tokens, trained in sizes]
    labels = [[-100] * end + row[end:] for row, end in zip(ids, ends, strict=True)]
    return {"input_ids": ids, "labels": labels}


def sft_config(session: dict, folder: str, *, cuda: bool, **changes):
    """trl's settings that are the same for every peer."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=session["micro"],
        gradient_accumulation_steps=session["effective"] // session["micro"],
        max_steps=MANY_STEPS,
        max_length=session["length"],
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim=OPTIMIZER if cuda else "adamw_torch",
        fp16=cuda,
        bf16=False,
        use_cpu=not cuda,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        packing=False,
        **({"train_sampling_strategy": "sequential"} if session["lengths"] else {}),
        **changes,
    )


class Llamanb:
    """llamanb itself: its planner, its loading with random weights made in place, its trainer."""

    def __init__(self, settings: dict, gpu: Gpu):
        import llamanb.model
        import llamanb.training.trainer  # noqa: F401

        self.settings, self.gpu, self.model = settings, gpu, None

    def versions(self) -> dict[str, str]:
        return installed(*PACKAGES)

    def prepare(self, session: dict) -> dict:
        """Plans, and loads the model: each session a new one, so that no trainer is wrapped around another's."""
        from llamanb.architecture import architecture

        plan = self._plan = self.plan(session)
        self.gpu.limit(False)  # 16-bit random weights are made whole before they are quantized
        self.model = self._load(plan, architecture(MODELS.get(self.settings["model"], "tiny")))
        self.gpu.rest()
        self.gpu.pretend()
        counts = {kind: plan.layers.count(kind) for kind in dict.fromkeys(plan.layers)}
        return {
            "micro": plan.micro_batch_size,
            "accumulation": plan.accumulation,
            "layers": counts,
            "fused": plan.fused,
            "kernel": plan.kernel,
            "needs_gib": plan.needs_gib,
            "plan": str(plan.table()),
        }

    def plan(self, session: dict):
        """The plan for the row's card, changed as the contestant's options say."""
        from llamanb import Recipe, rehearse
        from llamanb import plan as make_plan
        from llamanb.tape import CHECKPOINTED, HALVED, STORED

        options = dict(session["options"])
        forced = [options.pop(name, None) for name in ("stored", "halved")]
        again, fused = options.pop("again", CHECKPOINTED), options.pop("fused", None)
        speeds, rehearsed = options.pop("speeds", "own"), options.pop("rehearse", "")
        micro = options.pop("micro", session["micro"])
        micro = None if micro in (None, "plan") else int(micro)
        card = self._card(speeds)
        recipe = Recipe(
            model=MODELS.get(self.settings["model"], "tiny"),
            dataset="random",
            method="qlora-nf4",
            rank=RANK,
            effective_batch_size=max(EFFECTIVE, micro or 0),
            micro_batch_size=micro,
            max_length=session["length"],
            steps=MANY_STEPS,
            optimizer=OPTIMIZER if card.is_gpu else "auto",
            schedule="constant",
            warmup=0.0,
            precision="fp16" if card.is_gpu else "fp32",
            eval_rows=0,
            weights="resident",
        )
        recipe = recipe.replace(**{name: _number(value) for name, value in options.items()})
        plan = make_plan(recipe, card, force=any(forced))
        if rehearsed:
            plan = rehearse(plan)
        if any(forced) and plan.layers:
            depth = len(plan.layers)
            stored = min(int(forced[0] or 0), depth)
            halved = min(int(forced[1] or 0), depth - stored)
            kinds = {again: depth - stored - halved, HALVED: halved, STORED: stored}
            plan = plan.replace(layers=tuple(kind for kind, count in kinds.items() for _ in range(count)))
        return plan if fused is None else plan.replace(fused=fused == "1")

    def _card(self, speeds: str):
        """The row's card. A pretended one has by default the known card's own speeds: the plan is then the one that
        somebody with that card gets; `speeds=here` plans for those of the GPU that is there."""
        from llamanb import Card

        if not self.gpu.here:
            return Card.here()
        if not self.settings["card"]:
            return Card.here()
        pretended, known = Card.pretend(self.settings["card"]), Card.known(self.settings["card"])
        if speeds == "here":
            return pretended
        names = ("tflops", "bandwidth_gbs", "host_link_gbs", "launch_us")
        return replace(pretended, **{name: getattr(known, name) for name in names})

    def _load(self, plan, shape):
        from llamanb.model import attach_adapters, load_model
        from llamanb.quiet import quiet_libraries

        with quiet_libraries():
            return attach_adapters(load_model(plan, _tokenizer(), shape), plan.recipe)

    def trainer(self, session: dict, folder: str, turn):
        from pathlib import Path

        from llamanb.data import TrainingData
        from llamanb.data.encode import Encoded
        from llamanb.training.trainer import build_trainer

        vocabulary = self.model.config.vocab_size
        rows = [Encoded(*row) for row in zip(*token_rows(vocabulary, session).values(), strict=True)]
        data = TrainingData("random rows", "token ids", _tokenizer(), rows, [], [], [])
        trainer = build_trainer(self._plan, self.model, data, Path(folder), [turn])
        if session["lengths"]:
            trainer.args.train_sampling_strategy = "sequential"
        backward = trainer.accelerator.backward

        def told(*args, **kwargs):
            backward(*args, **kwargs)
            turn.micro_batch_done()

        trainer.accelerator.backward = told  # it splits a step into micro-batches itself
        return trainer

    def finish(self, trainer) -> None:
        from llamanb.training.trainer import let_go

        let_go()
        self.model = None


class Trl:
    """trl as it comes: SFTTrainer with peft and bitsandbytes, its own checkpointing of every layer. The one change is
    the one without which it stops at the first step: trained parameters in fp32 (FP16 gradients of bf16 parameters
    cannot be unscaled)."""

    def __init__(self, settings: dict, gpu: Gpu):
        import peft  # noqa: F401
        import transformers  # noqa: F401
        import trl  # noqa: F401

        self.settings, self.gpu = settings, gpu

    def versions(self) -> dict[str, str]:
        return installed(*PACKAGES)

    def prepare(self, session: dict) -> dict:
        self.gpu.pretend()
        return {"micro": session["micro"], "accumulation": session["effective"] // session["micro"]}

    def trainer(self, session: dict, folder: str, turn):
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTTrainer

        checkpoint = self.settings["checkpoint"]
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=torch.float16 if self.gpu.here else torch.float32,
            device_map={"": 0} if self.gpu.here else "cpu",
            attn_implementation="sdpa",
        )
        trainer = SFTTrainer(
            model=model,
            args=sft_config(session, folder, cuda=self.gpu.here),
            train_dataset=Dataset.from_dict(token_rows(model.config.vocab_size, session)),
            processing_class=AutoTokenizer.from_pretrained(checkpoint),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=RANK, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", target_modules=LINEAR
            ),
            callbacks=[turn],
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return trainer

    def finish(self, trainer) -> None:
        _forget_embeddings()


class Unsloth:
    """Unsloth's pinned release through its public functions, as its notebooks call them. One process has one kind of
    checkpointing, which Unsloth patches in for the whole process; the model stays from session to session."""

    def __init__(self, settings: dict, gpu: Gpu):
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        self.settings, self.gpu, self.model = settings, gpu, None
        import unsloth  # noqa: F401

        self.gpu.pretend()

    def versions(self) -> dict[str, str]:
        return installed(*PACKAGES, "unsloth", "unsloth_zoo")

    def prepare(self, session: dict) -> dict:
        self.gpu.pretend()
        if self.model is None:
            self._load()
        _clear_budgets()
        return {
            "micro": session["micro"],
            "accumulation": session["effective"] // session["micro"],
            "checkpointing": self.settings["mode"],
        }

    def _load(self) -> None:
        import torch
        from unsloth import FastLanguageModel

        mode = self.settings["mode"]
        checkpointing = {"on": True, "off": False}.get(mode, "unsloth")
        model, self.tokenizer = FastLanguageModel.from_pretrained(
            self.settings["checkpoint"],
            max_seq_length=self.settings["longest"],
            dtype=torch.float16 if self.gpu.here else torch.float32,
            load_in_4bit=True,
            use_gradient_checkpointing=checkpointing,
        )
        self.model = FastLanguageModel.get_peft_model(
            model,
            r=self.settings.get("rank", RANK),
            target_modules=LINEAR,
            lora_alpha=self.settings.get("rank", RANK),
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing=checkpointing,
            **({"checkpoint_skip_layers": "auto"} if mode == "auto" else {}),
        )

    def trainer(self, session: dict, folder: str, turn):
        from datasets import Dataset
        from trl import SFTTrainer

        rows = token_rows(self.model.config.vocab_size, session)
        rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
        return SFTTrainer(
            model=self.model,
            args=sft_config(session, folder, cuda=self.gpu.here, seed=3407, dataset_num_proc=1),
            train_dataset=Dataset.from_dict(rows),
            processing_class=self.tokenizer,
            callbacks=[turn],
        )

    def finish(self, trainer) -> None:
        """The model as it was before: without the trainer's autocast around its forward, and without gradients."""
        _forget_embeddings()
        if trainer is not None:
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            trainer.model.zero_grad(set_to_none=True)


STACKS = {"llamanb": Llamanb, "trl": Trl, "unsloth": Unsloth}


def _number(value: str):
    """A recipe's field from the command line."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return {"true": True, "false": False, "none": None}.get(value.lower(), value)


def _forget_embeddings() -> None:
    """The Trainer registers embeddings with bitsandbytes for as long as a process lives."""
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()


def _clear_budgets() -> None:
    """Unsloth reads once a process how much memory is free and sizes the parts of its loss by that; each session here
    stands for a process of its own, so what it remembers is forgotten."""
    for name, module in list(sys.modules.items()):
        if name.startswith("unsloth_zoo.fused_losses"):
            for function in ("_budget_bytes", "_measured_target_gb", "_get_chunk_multiplier"):
                clear = getattr(getattr(module, function, None), "cache_clear", None)
                if clear:
                    clear()


def _tokenizer():
    """As much of a tokenizer as llamanb's trainer asks for: padding and end tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<|begin_of_text|>": 1, "<|eot_id|>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<pad>",
    )
