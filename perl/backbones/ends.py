"""What ends an answer by the model's own generation configuration."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def configured_ends(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens at which servers stop by the model's generation configuration.

    A model without generation_config.json has what its config.json says or, where that says nothing, the default
    of its class (Llama's is 2, whatever that is in this vocabulary): of these only tokens count that are no
    ordinary text.
    """
    settings = getattr(lm, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = [] if ends is None else [ends] if isinstance(ends, int) else [int(end) for end in ends]
    if getattr(settings, "_from_model_config", False):
        added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        ends = [end for end in ends if end in added]
    return ends
