"""A language model of one's own as a base: each position adds up all before it. A plugin file."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, modeling_outputs

from perl.backbones import BACKBONES, Decoder, Unsupported


class SumsConfig(PreTrainedConfig):
    model_type, vocab_size, hidden_size, num_hidden_layers = "sums", 300, 32, 2


class SumsForCausalLM(PreTrainedModel):
    config_class = SumsConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(config.num_hidden_layers))
        self.embed_tokens, self.lm_head = nn.Embedding(300, 32), nn.Linear(32, 300)
        self.post_init()

    def forward(self, input_ids):
        hidden_BLD = Sums(self.config).hidden(self, input_ids, input_ids >= 0)
        return modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden_BLD))


class Sums(Decoder):
    model_type = "sums"
    unsupported = (Unsupported("generation", "it has no KV cache", "Train only a reward model on it."),)

    def hidden(self, lm, ids_BL, mask_BL, embeddings_BLD=None):
        hidden_BLD = lm.embed_tokens(ids_BL) * mask_BL[..., None]
        for layer in lm.layers:
            hidden_BLD = hidden_BLD + layer(hidden_BLD.cumsum(1)).tanh()
        return hidden_BLD


AutoConfig.register("sums", SumsConfig)
AutoModelForCausalLM.register(SumsConfig, SumsForCausalLM)
BACKBONES["sums"] = Sums
