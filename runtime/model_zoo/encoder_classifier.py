"""A pretrained text encoder followed by a new linear layer."""

from __future__ import annotations

from torch import Tensor, nn


class EncoderClassifier(nn.Module):
    """Classify texts by the mean of their tokens' encodings (Reimers and Gurevych 2019, section 3, "MEAN").

    Args:
        encoder: called as ``encoder(input_ids=…, attention_mask=…)``; returns something with ``last_hidden_state``
            (batch, length, width), as transformers' ``AutoModel`` does. Leave out its pooling layer
            (``add_pooling_layer: false``): it would be trainable but get no gradient.
        num_classes: number of classes.
        width: of the encodings. Default: ``encoder.config.hidden_size``.
        dropout: probability of zeroing a feature before the linear layer while training.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, *, width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: it must be at least 1")
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        if width is None:
            config = getattr(encoder, "config", None)
            width = getattr(config, "hidden_size", None)
        if width is None:
            raise ValueError("width: the encoder has no config.hidden_size; give the width of its encodings")
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the class scores of each text.

        Args:
            input_ids: (batch, length) int64.
            attention_mask: (batch, length), 1 for tokens and 0 for padding.

        Returns:
            logits: (batch, num_classes) float.
        """
        encoded = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        counted = attention_mask.unsqueeze(-1).to(encoded.dtype)
        mean = (encoded * counted).sum(1) / counted.sum(1).clamp(min=1)
        logits: Tensor = self.head(self.dropout(mean))
        return logits
