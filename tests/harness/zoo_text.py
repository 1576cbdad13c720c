"""transformers' encoders of text and its language models, small and with random weights.

Encoders make vectors of titles for a tower of news (as NRMS); language models learn sequences of tokens of items, by
their own loss, which forward computes of labels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.harness.loops import Loop

TOKENS, LENGTH, ROWS, DIM = 40, 6, 9, 8
HISTORY, CANDIDATES = 3, 2

BERT: dict[str, Any] = {
    "hidden_size": DIM,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertModel, news": ("BertConfig", BERT),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "BertForMaskedLM": ("BertConfig", BERT),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {
            "n_positions": 16,
            "n_embd": DIM,
            "n_layer": 1,
            "n_head": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {"hidden_size": DIM, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "d_model": DIM,
            "d_kv": 4,
            "d_ff": 16,
            "num_layers": 1,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
    ),
}


class News(nn.Module):
    """Scores of news for what a user has read: attention over titles' vectors, of which the first token's are taken."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.attention = encoder, nn.MultiheadAttention(DIM, 2, batch_first=True)

    def titles(self, tokens: Tensor) -> Tensor:
        flat = tokens.flatten(0, 1)
        states = self.encoder(input_ids=flat, attention_mask=(flat != 0).long()).last_hidden_state
        return states[:, 0].unflatten(0, tokens.shape[:2])

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        read = self.titles(history)
        user = self.attention(read, read, read, need_weights=False)[0].mean(1)
        return torch.einsum("bd,bcd->bc", user, self.titles(candidates))


class LossOf(nn.Module):
    """The loss that a model's own forward returns beside its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss


def _model(name: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config, settings = MODELS[name]
    cls = getattr(transformers, name.partition(",")[0])
    torch.manual_seed(0)
    made = getattr(transformers, config)(vocab_size=TOKENS, pad_token_id=0, use_cache=False, **settings)
    return cls(made, add_pooling_layer=False) if name == "BertModel, news" else cls(made)


def _titles(g: torch.Generator, *shape: int) -> Tensor:
    tokens = torch.randint(2, TOKENS, (*shape, LENGTH), generator=g)
    length = torch.randint(2, LENGTH + 1, shape, generator=g)
    return torch.where(torch.arange(LENGTH) < length.unsqueeze(-1), tokens, 0)


def _batch(name: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    tokens = _titles(g, ROWS)
    classes = torch.randint(2, (ROWS,), generator=g)
    labels = classes if name == "BertForSequenceClassification" else torch.where(tokens != 0, tokens, -100)
    return {"input_ids": tokens, "attention_mask": (tokens != 0).long(), "labels": labels}


def text(name: str) -> tuple[nn.Module, Any]:
    if name == "BertModel, news":
        g = torch.Generator().manual_seed(0)
        return News(_model(name)), (_titles(g, ROWS, HISTORY), _titles(g, ROWS, CANDIDATES))
    return LossOf(_model(name)), ((), _batch(name))


def tiger() -> tuple[nn.Module, Any]:
    """torch-rechub's generator of item tokens, which is a T5 of transformers."""
    import transformers
    from torch_rechub.models.generative import TIGERModel

    config, settings = MODELS["T5ForConditionalGeneration"]
    settings = settings | {"vocab_size": TOKENS, "pad_token_id": 0, "use_cache": False}
    model = TIGERModel(getattr(transformers, config)(**settings))
    return LossOf(model), ((), _batch("TIGERModel") | {"return_dict": True})


LOOPS = tuple(name for name in MODELS if name != "BertModel, news")
"""Those that have a loss of their own."""


def loop(name: str) -> Loop:
    """transformers' `Trainer`, on batches in their order.

    Of what it does by itself two things are of this rank's part alone, and off: it clips gradients, and gives forward
    the number of this rank's tokens to divide its loss by.
    """
    import transformers

    model = _model(name).double()

    class InOrder(transformers.Trainer):
        losses: list[float]

        def get_train_dataloader(self) -> Any:
            return self.train_dataset

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

    def train(net: nn.Module, batches: Sequence[Any]) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            settings = transformers.TrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                max_grad_norm=0.02,  # so that it clips
                learning_rate=0.01,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
            )
            trainer = InOrder(net, settings, train_dataset=[kwargs for _, kwargs in batches])
            trainer.model_accepts_loss_kwargs, trainer.losses = False, []
            trainer.train()
        return trainer.losses

    return Loop(model, ((), _batch(name)), train, in_place=True)
