"""A model of partial-rope as a class for Hugging Face's Transformers:

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

`eval export --with-code` writes this file and reference.py, which has the blocks, beside the weights, whose names are
those of a checkpoint. There is no key/value cache: generation computes every token from all before it.
"""

import dataclasses

import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .reference import Block, Config, make_norm, rope_table, rotary_dims


KEYS = {"rope_scaling": "frequency_scaling"}  # other names than a run's: Transformers looks into its own rope_scaling


class PartialRopeConfig(PretrainedConfig):
    """The keys of a run's config.json, those of KEYS under another name, and the names that others look for."""

    model_type = "partial_rope"
    attribute_map = {"vocab_size": "vocab", "hidden_size": "width", "num_hidden_layers": "layers",
                     "num_attention_heads": "heads", "max_position_embeddings": "context"}


class PartialRopeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = PartialRopeConfig

    def __init__(self, config):
        super().__init__(config)
        self.ours = c = Config(**{field.name: getattr(config, KEYS.get(field.name, field.name), field.default)
                                  for field in dataclasses.fields(Config)})
        self.embedding = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.final_norm = make_norm(c, c.width)
        if not c.tied:
            self.head = nn.Linear(c.width, c.vocab, bias=c.head_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        """All tokens every time: some versions take for granted that a model keeps what it has seen."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids, attention_mask=None, labels=None, **unused):
        """input_ids (B, T) -> logits (B, T, V); with labels (B, T) also the mean loss of all but the first, in nats."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("padding on the left is not supported: texts begin at position 0")
        dims = rotary_dims(self.ours)
        tables = {R: [table.to(input_ids.device) for table in rope_table(self.ours, input_ids.shape[1], R)]
                  for R in {*dims}}
        x = self.embedding(input_ids)
        for layer, R in zip(self.layers, dims):
            x = layer(x, *tables[R])
        x = self.final_norm(x)
        logits = F.linear(x, self.embedding.weight) if self.ours.tied else self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
