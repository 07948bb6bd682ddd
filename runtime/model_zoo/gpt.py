"""A minimal decoder-only transformer: GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

import math

from torch import Tensor, nn

INITIAL_STD = 0.02  # Radford et al. 2018, section 4.1


class GPT(nn.Module):
    """Predict each token of a sequence from the tokens before it.

    Token and position embeddings, then ``num_layers`` pre-norm blocks of attention and MLP, then
    logits by the transposed token embedding. That matrix is one parameter under one name, used
    twice (Press and Wolf 2017), so no checkpoint or shard can hold two versions of it.

    Args:
        vocab_size: number of distinct tokens.
        context_length: longest sequence; there is one learned embedding per position.
        num_layers: transformer blocks.
        num_heads: attention heads of a block; must divide ``width``.
        width: size of a token's representation.
        dropout: probability of zeroing an embedding, attention weight or residual branch's output
            while training.

    Raises:
        ValueError: a size is below 1, ``num_heads`` does not divide ``width``, or dropout is
            outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        *,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "vocab_size": vocab_size,
            "context_length": context_length,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "width": width,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: it must be at least 1")
        if width % num_heads != 0:
            raise ValueError(
                f"width={width} cannot be divided among num_heads={num_heads}: make width a multiple of num_heads"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: it must be at least 0 and below 1")

        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(num_layers))
        self.final_norm = nn.LayerNorm(width)
        self._initialize(num_layers)

    def _initialize(self, num_layers: int) -> None:
        """Initialise the weights as GPT-2 does (Radford et al. 2019, section 2.3).

        Each block adds two branches to the residual stream, so it sums 2 * num_layers in total.
        Scaling their last layers by 1 / sqrt(2 * num_layers) keeps that sum's variance
        independent of depth.
        """
        residual_std = INITIAL_STD / math.sqrt(2 * num_layers)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                nn.init.normal_(module.output.weight, std=residual_std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            tokens: (batch, time) int64, time at most ``context_length``.

        Returns:
            logits: (batch, time, vocab_size) float; those at time t depend only on tokens 0 to t.

        Raises:
            ValueError: the sequence is longer than ``context_length``.
        """
        time = tokens.shape[1]
        if time > self.context_length:
            raise ValueError(f"{time} tokens exceed context_length={self.context_length}")
        # The first rows of the table are the embeddings of positions 0 to time - 1.
        positions = self.position_embedding.weight[:time]
        stream = self.dropout(self.token_embedding(tokens) + positions)
        for block in self.blocks:
            stream = block(stream)
        return nn.functional.linear(self.final_norm(stream), self.token_embedding.weight)


class Block(nn.Module):
    """Add attention, then an MLP, to the residual stream: (batch, time, width) to the same."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the stream, (batch, time, width), with this block's contribution added."""
        stream = stream + self.attention(self.attention_norm(stream))
        output: Tensor = stream + self.feed_forward(self.feed_forward_norm(stream))
        return output


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2).

    The causal mask is an argument of the fused kernel, not a buffer: nothing to save, and no
    memory that grows with the square of the context length.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout_probability = dropout
        # One matrix product for queries, keys and values.
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Attend from each position to itself and those before: (batch, time, width) to the same."""
        batch, time, width = stream.shape
        query, key, value = (
            self.query_key_value(stream)
            .view(batch, time, 3, self.num_heads, width // self.num_heads)
            .permute(2, 0, 3, 1, 4)  # (3, batch, heads, time, head width)
        )
        attended = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout_probability if self.training else 0.0,
            is_causal=True,
        )
        attended = attended.transpose(1, 2).reshape(batch, time, width)
        output: Tensor = self.output_dropout(self.output(attended))
        return output


class FeedForward(nn.Module):
    """Position-wise MLP: linear layer to four times the width, GELU, linear layer back."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, 4 * width)
        # GPT-2 uses the tanh approximation (Hendrycks and Gimpel 2016).
        self.activation = nn.GELU(approximate="tanh")
        self.output = nn.Linear(4 * width, width)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Return the transformed positions: (batch, time, width)."""
        output: Tensor = self.output_dropout(self.output(self.activation(self.hidden(stream))))
        return output
