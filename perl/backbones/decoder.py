"""Decoders, i.e. causal language models: they generate, and score a row at its last token."""

import copy
from collections.abc import Container
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.backbone import Backbone, Use, has_own_code
from perl.backbones.chat import ChatFormat
from perl.backbones.logits import logits_transform
from perl.backbones.padding import left_pad, positions
from perl.errors import LOADING, UserError, machine_fault
from perl.private.transformers import cache_argument, caches_keys_and_values, is_derived

GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Suffixes of architectures that generate text."""
REMEDY = "Give a hub id such as Qwen/Qwen2.5-0.5B, or a folder with config.json and model.safetensors."


class Decoder(Backbone):
    """A causal language model whose logits in transformers are transform(output embedding · trunk)."""

    kind = "a causal LM"
    auto_class = AutoModelForCausalLM
    configs: ClassVar[Container[type]] = MODEL_FOR_CAUSAL_LM_MAPPING
    """The configurations for which transformers has a model of this kind."""

    @classmethod
    def matches(cls, config: Any) -> bool:
        """Return True, as other backbones take precedence; a subclass with a model type matches only this type."""
        return cls.model_type in (None, config.model_type)

    def refusal(self, use: Use, where: str) -> UserError | None:
        """Also refuse generation without a cache of attention keys and values."""
        refused = super().refusal(use, where)
        if refused is None and use == "generation" and not caches_keys_and_values(self.config):
            return UserError(
                "sampling requires a cache of attention keys and values, but models of type "
                f"{self.config.model_type} have a recurrent or convolutional state, or no cache",
                where=where,
                remedy="Use a causal LM of attention layers only (docs/models.md), or train only a reward model.",
            )
        return refused

    def prepare(self, where: str) -> None:
        """Refuse a configuration without a language model of this kind, or of an architecture without its head."""
        if type(self.config) not in self.configs and not has_own_code(self.config):
            what = f"not {self.kind}: transformers has none of type {self.config.model_type}"
            raise UserError(what, where=where, remedy="Use a base of another type, such as llama or qwen3.")
        architectures = self.config.architectures or []
        if any(not name.endswith(GENERATES) for name in architectures):
            raise UserError(f"not a causal LM but {', '.join(architectures)}", where=where, remedy=REMEDY)

    def check(self, lm: PreTrainedModel, where: str) -> None:
        """Refuse a model that is not causal, reads padding, or transforms its logits in an unsupported way."""
        name, remedy = type(lm).__name__, "This architecture is not supported yet."
        embedding = lm.get_output_embeddings()
        if embedding is None:
            raise UserError("the model has no language-model head", where=where, remedy="Use a causal LM.")
        try:
            logits_BNV, hidden_BND = self._try(lm.eval())
            padded = [self._padded(lm, pad_id).float() for pad_id in (self.tried[0][0], self.tried[0][-1])]
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if machine_fault(error, LOADING):
                raise
            what = f"{name} does not work like the causal LMs of transformers: {error!r:.200}"
            raise UserError(what, where=where, remedy=remedy) from None
        if not _close(logits_BNV[0, :-1], logits_BNV[1, :-1]):
            what = f"{name} is not causal: its output for a token depends on later ones"
            raise UserError(what, where=where, remedy="Use a causal LM.")
        if not _close(*padded):
            what = f"{name} reads padding: its output for a row depends on the padding token"
            raise UserError(what, where=where, remedy=remedy)
        product_BNV = embedding(hidden_BND).float()
        if not _close(logits_transform(lm.config).apply_(product_BNV, temperature=1.0), logits_BNV):
            what = f"{name} transforms its logits after the output embedding in an unknown way"
            raise UserError(what, where=where, remedy=remedy)

    @torch.no_grad()
    def _try(self, lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Return transformers' logits (B, N, V), float32, and hidden states (B, N, D) of the last N tokens."""
        ids_BL = torch.tensor(self.tried, device=lm.get_output_embeddings().weight.device)
        logits_BNV = self.own_logits(lm, ids_BL).float()
        hidden_BLD = self.hidden(lm, ids_BL, torch.ones_like(ids_BL, dtype=torch.bool))
        return logits_BNV, hidden_BLD[:, -logits_BNV.shape[1] :]

    @torch.no_grad()
    def _padded(self, lm: PreTrainedModel, pad_id: int) -> Tensor:
        """Return the hidden states (B, L, D) of rows padded on the left with this token, without the padding."""
        ids_BL, mask_BL = left_pad(self.tried, pad_id, lm.get_output_embeddings().weight.device)
        return self.hidden(lm, ids_BL, mask_BL)[:, -len(self.tried[0]) :]

    def own_logits(self, lm: PreTrainedModel, ids_BL: Tensor) -> Tensor:
        """Return transformers' logits (B, N, V) of the last N positions of rows without padding."""
        logits_BLV: Tensor = lm(input_ids=ids_BL).logits
        return logits_BLV

    def chat_format(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Return the tokenizer's chat template with the generation configuration's end tokens."""
        return ChatFormat(tokenizer, configured_ends(lm, tokenizer))

    def hidden(
        self, lm: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor, embeddings_BLD: Tensor | None = None
    ) -> Tensor:
        """Count positions over real tokens, so that the padding side does not matter, even in GPT-2."""
        inputs = {"input_ids": ids_BL} if embeddings_BLD is None else {"inputs_embeds": embeddings_BLD}
        hidden_BLD: Tensor = lm.base_model(
            **inputs, attention_mask=mask_BL.long(), position_ids=positions(mask_BL), use_cache=False
        ).last_hidden_state
        return hidden_BLD

    def states(
        self,
        lm: PreTrainedModel,
        ids_BL: Tensor,
        mask_BL: Tensor,
        completion_length: int,
        embeddings_BLD: Tensor | None = None,
    ) -> Tensor:
        """Return the states one position before each token of the completion."""
        return self.hidden(lm, ids_BL, mask_BL, embeddings_BLD)[:, -completion_length - 1 : -1]

    def extend(
        self, lm: PreTrainedModel, ids_BN: Tensor, mask_BL: Tensor, attention_mask: Tensor, cache: Cache
    ) -> Tensor:
        """Compute them with transformers' own forward with a cache."""
        hidden_BND: Tensor = lm.base_model(
            input_ids=ids_BN,
            attention_mask=attention_mask,
            position_ids=positions(mask_BL)[:, -ids_BN.shape[1] :],
            use_cache=True,
            **{cache_argument(type(lm).forward): cache},
        ).last_hidden_state
        return hidden_BND

    def head_modules(self, lm: PreTrainedModel) -> list[str]:
        """Return the single linear layer, `score`."""
        return ["score"]

    def new_head(self, lm: PreTrainedModel) -> nn.Linear:
        """Create a linear layer without a bias."""
        embedding = lm.get_output_embeddings().weight
        head = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=torch.float32)
        nn.init.zeros_(head.weight)
        return head

    def head_parameters(self, head: nn.Module) -> dict[str, nn.Parameter]:
        """Return `score.weight`."""
        return {f"score.{name}": parameter for name, parameter in head.named_parameters()}

    def score(
        self,
        lm: PreTrainedModel,
        head: nn.Module,
        ids_BL: Tensor,
        mask_BL: Tensor,
        embeddings_BLD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Score each row at its last real token."""
        hidden_BLD = self.hidden(lm, ids_BL, mask_BL, embeddings_BLD)
        last_B = mask_BL.long().cumsum(1).argmax(1)
        last_BD = hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
        scores_B: Tensor = head(last_BD.float()).squeeze(-1)
        return scores_B, hidden_BLD

    def classifier(
        self, lm: PreTrainedModel, head: nn.Module, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> PreTrainedModel:
        """Create the classifier of this architecture, with `score` in the base's dtype."""
        config = copy.deepcopy(config)
        text = config.get_text_config()
        padding, text.pad_token_id = text.pad_token_id, None  # it may be beyond the last row of the embeddings
        try:
            with torch.device("meta"):  # its own weights are never used
                model = AutoModelForSequenceClassification.from_config(
                    config, dtype=lm.dtype, trust_remote_code=has_own_code(config)
                )
        except ValueError:
            model = None
        if not isinstance(getattr(model, "score", None), nn.Linear):
            what = f"transformers has no sequence classifier with a linear layer `score` for {type(lm).__name__}"
            remedy = "Only language models of this architecture can be exported."
            raise UserError(what, where=lm.name_or_path, remedy=remedy)
        assert isinstance(model, PreTrainedModel)
        setattr(model, model.base_model_prefix, lm.base_model)
        model.score = copy.deepcopy(head).to(lm.dtype)
        known = model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > known:  # padding is never attended to, so its embedding does not matter
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.get_input_embeddings().weight.data[known:] = 0
        model.config.get_text_config().pad_token_id = padding
        return model


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=1e-2)


def configured_ends(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens in the model's generation configuration.

    Without generation_config.json they come from config.json or the default of the model's class (Llama: 2,
    whatever that is in this vocabulary), and then only special and added tokens count.
    """
    generation = getattr(lm, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]
    if generation is not None and is_derived(generation):
        added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        ends = [end for end in ends if end in added]
    return ends
