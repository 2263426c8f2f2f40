"""Stand-ins for the language models of GLIP and GroundingDINO, which are not quantized and come from the network."""
from __future__ import annotations

import re
from collections import OrderedDict
from types import SimpleNamespace

import torch
from torch import nn

from ..registry import MODELS

WIDTH = 768  # of BERT's vectors


class Words:
    """What a tokenizer returns, of words between spaces, as far as mmdet asks."""

    def __init__(self, captions: list[str]):
        spans = [[match.span() for match in re.finditer(r'\S+', caption)] for caption in captions]
        self.spans = spans[0]
        length = max(map(len, spans)) + 2
        self.input_ids = torch.zeros(len(captions), length, dtype=torch.long)
        for row, (caption, places) in enumerate(zip(captions, spans)):
            words = [TinyLanguageModel.number(caption[start:end]) for start, end in places]
            self.input_ids[row, :len(words) + 2] = torch.tensor([1, *words, 2])
        self.attention_mask = (self.input_ids > 0).long()

    def __getitem__(self, name):
        return getattr(self, name)

    def char_to_token(self, place: int) -> int | None:
        return next((i + 1 for i, (start, end) in enumerate(self.spans) if start <= place < end), None)


@MODELS.register_module()
class TinyLanguageModel(nn.Module):
    """Stands in for mmdet's BertModel, which is not quantized and needs transformers and weights from the network: one
    random vector a word.
    """
    WORDS = 64

    def __init__(self, max_tokens=256, pad_to_max=True, use_sub_sentence_represent=False, **unused):
        super().__init__()
        self.language_backbone = nn.Sequential(OrderedDict(body=nn.Embedding(self.WORDS, WIDTH)))
        self.language_backbone.body.language_dim = WIDTH
        self.max_tokens, self.pad_to_max, self.by_sentence = max_tokens, pad_to_max, use_sub_sentence_represent

    @classmethod
    def number(cls, word: str) -> int:
        return 3 if word == '.' else 4 + sum(map(ord, word)) % (cls.WORDS - 4)

    @staticmethod
    def tokenizer(captions, **unused):
        return Words(captions)

    def forward(self, captions, **unused) -> dict:
        from mmdet.models.language_models.bert import generate_masks_with_special_tokens_and_transfer_map as masks_of
        words = Words(captions)
        masks, positions = masks_of(words, [1, 2, 3]) if self.by_sentence else (words.attention_mask, None)
        embedded = self.language_backbone(words.input_ids)
        return dict(embedded=embedded, hidden=embedded, masks=masks, position_ids=positions,
                    text_token_mask=words.attention_mask.bool())


class LanguageLayer(nn.Module):
    """Stands in for the layer of BERT between two fusions of image and text in GLIP's head: one product a word."""

    def __init__(self, config, **unused):
        super().__init__()
        self.layer = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, features: dict) -> dict:
        language = features['lang']
        return dict(features, lang=dict(language, hidden=self.layer(language['hidden'])))


def without_language(model: dict) -> dict:
    """Replaces BERT in a model config, in place, and in this process in mmdet's head for GLIP."""
    language = model.get('language_model') or {}
    if language.get('type') == 'BertModel':
        language['type'] = 'psaq_mm.TinyLanguageModel'
        if model['type'] == 'GLIP':
            from mmdet.models.dense_heads import atss_vlfusion_head as head
            head.BertConfig = SimpleNamespace(from_pretrained=lambda name: SimpleNamespace(hidden_size=WIDTH))
            head.BertEncoderLayer = LanguageLayer
    return model
