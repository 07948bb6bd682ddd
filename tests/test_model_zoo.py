"""The models do what their papers say: shapes, parameter counts, causality, initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from runtime.model_zoo import GPT, MLP, ConvNet
from runtime.model_zoo.gpt import Attention, FeedForward


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def small_gpt(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(vocab_size=11, context_length=16, num_layers=2, num_heads=4, width=32, dropout=dropout)


# MLP


def test_mlp_counts_weights_and_biases_of_every_layer() -> None:
    model = MLP(10, [64, 32], 3)
    assert num_parameters(model) == (10 * 64 + 64) + (64 * 32 + 32) + (32 * 3 + 3)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: 1 - 2 / (torch.exp(2 * x) + 1)),
    ],
)
def test_mlp_applies_the_named_activation_between_layers_and_none_at_the_end(
    name: str, function: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    model = MLP(3, [5], 2, activation=name).double()
    features = torch.randn(7, 3, dtype=torch.float64)
    weight, bias, last_weight, last_bias = model.parameters()
    expected = function(features @ weight.T + bias) @ last_weight.T + last_bias
    torch.testing.assert_close(model(features), expected)


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = MLP(4, [], 2).double()
    a, b = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(a) + model(b), model(a + b) + model(torch.zeros_like(a)))


def test_mlp_with_one_output_keeps_its_dimension() -> None:
    assert MLP(10, [8], 1)(torch.randn(6, 10)).shape == (6, 1)


def test_mlp_drops_activations_in_training_only() -> None:
    torch.manual_seed(0)
    model, features = MLP(4, [64], 2, dropout=0.5), torch.randn(3, 4)
    assert not torch.equal(model(features), model(features))
    model.eval()
    assert torch.equal(model(features), model(features))


# ConvNet


def test_convnet_has_no_convolution_bias_and_two_parameters_per_normalised_channel() -> None:
    model = ConvNet(1, [16, 32], 10)
    stages = (1 * 16 * 9 + 2 * 16) + (16 * 32 * 9 + 2 * 32)
    assert num_parameters(model) == stages + (32 * 10 + 10)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 9), (1, 1)])
def test_convnet_classifies_images_of_any_size(size: tuple[int, int]) -> None:
    model = ConvNet(1, [4, 8, 16, 16, 16, 16], 10).eval()
    assert model(torch.randn(2, 1, *size)).shape == (2, 10)


def test_convnet_halves_its_maps_in_every_stage_but_the_first() -> None:
    maps = ConvNet(1, [4, 4, 4], 10).stages(torch.randn(2, 1, 28, 28))
    assert maps.shape[2:] == (28 / 4, 28 / 4)


def test_convnet_normalises_each_channel_over_batch_and_positions() -> None:
    model = ConvNet(3, [8], 10)
    normalised = []
    model.get_submodule("stages.0.1").register_forward_hook(lambda _module, _inputs, output: normalised.append(output))
    model(torch.randn(16, 3, 8, 8) * 5 + 3)
    torch.testing.assert_close(normalised[0].mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised[0].var(dim=(0, 2, 3), correction=0), torch.ones(8), atol=1e-3, rtol=0)


def test_convnet_judges_an_image_alone_as_in_a_batch_when_evaluating() -> None:
    model = ConvNet(1, [8, 16], 10).double()
    images = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    model(images)
    model.eval()
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(model(images), alone)


def test_convnet_sends_a_gradient_to_every_parameter() -> None:
    torch.manual_seed(0)
    model = ConvNet(1, [8, 16], 10)
    model(torch.randn(16, 1, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


# GPT


def gpt_size(vocabulary: int, context: int, layers: int, width: int) -> int:
    """Count GPT-2's parameters: embeddings, 12 matrices and 13 vectors a block, the last norm."""
    return (vocabulary + context) * width + layers * (12 * width**2 + 13 * width) + 2 * width


@pytest.mark.parametrize("sizes", [(257, 128, 4, 64), (11, 16, 1, 32)])
def test_gpt_has_as_many_parameters_as_a_gpt2_of_its_size(sizes: tuple[int, int, int, int]) -> None:
    # The released model of 12 layers: https://huggingface.co/openai-community/gpt2.
    assert gpt_size(50_257, 1024, 12, 768) == 124_439_808
    vocabulary, context, layers, width = sizes
    model = GPT(vocabulary, context, num_layers=layers, num_heads=4, width=width)
    assert num_parameters(model) == gpt_size(*sizes)


def test_gpt_later_tokens_leave_earlier_logits_unchanged() -> None:
    model = small_gpt()
    tokens = torch.randint(11, (3, 16))
    logits = model(tokens)
    for time in range(1, 16):
        changed = tokens.clone()
        changed[:, time:] = (changed[:, time:] + 1) % 11
        torch.testing.assert_close(model(changed)[:, :time], logits[:, :time])


def test_gpt_every_token_reaches_every_later_logit() -> None:
    model = small_gpt()
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.token_embedding.register_forward_hook(keep)
    logits = model(torch.randint(11, (1, 16)))
    for time in range(16):
        (gradient,) = torch.autograd.grad(logits[0, time, 0], embedded[0], retain_graph=True)
        assert (gradient[0].abs().sum(dim=1) > 0).tolist() == [t <= time for t in range(16)]


def test_gpt_tells_positions_apart() -> None:
    logits = small_gpt()(torch.full((1, 16), 5))
    assert torch.unique(logits[0], dim=0).shape[0] == 16


def test_gpt_a_prefix_has_the_logits_it_has_in_a_longer_sequence() -> None:
    model, tokens = small_gpt(), torch.randint(11, (2, 16))
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_gpt_blocks_compute_what_torchs_pre_norm_encoder_layers_compute() -> None:
    model = small_gpt().double()
    mask = nn.Transformer.generate_square_subsequent_mask(16, dtype=torch.float64)
    tokens = torch.randint(11, (3, 16))
    expected = model.token_embedding(tokens) + model.position_embedding(torch.arange(16))
    for block in model.blocks:
        for parameter in block.parameters():  # so that no bias and no gain is trivial
            nn.init.normal_(parameter, std=0.2)
        reference = nn.TransformerEncoderLayer(
            d_model=32,
            nhead=4,
            dim_feedforward=4 * 32,
            dropout=0.0,
            activation=nn.GELU(approximate="tanh"),
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        # Both list attention (in, out), then the MLP (in, out), then the norms; ours in order.
        ours = dict(block.named_parameters())
        names = {
            "self_attn.in_proj_": "attention.query_key_value.",
            "self_attn.out_proj.": "attention.output.",
            "linear1.": "feed_forward.hidden.",
            "linear2.": "feed_forward.output.",
            "norm1.": "attention_norm.",
            "norm2.": "feed_forward_norm.",
        }
        reference.load_state_dict(
            {f"{theirs}{kind}": ours[f"{name}{kind}"] for theirs, name in names.items() for kind in ("weight", "bias")}
        )
        expected = reference(expected, src_mask=mask)
    expected = model.final_norm(expected) @ model.token_embedding.weight.T
    torch.testing.assert_close(model(tokens), expected)


def test_gpt_uses_one_matrix_for_embedding_and_output() -> None:
    model = small_gpt()
    vocabulary_matrices = [name for name, parameter in model.named_parameters() if parameter.shape[0] == 11]
    assert vocabulary_matrices == ["token_embedding.weight"]
    logits = model(torch.tensor([[1, 2, 3]]))
    logits.sum().backward()
    gradient = model.token_embedding.weight.grad
    assert gradient is not None
    # Through the input only three rows could have one.
    assert (gradient.abs().sum(dim=1) > 0).all()


def test_gpt_saves_parameters_only_and_each_once() -> None:
    state = small_gpt().state_dict()
    assert not list(small_gpt().buffers())
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)


def test_gpt_starts_as_gpt2_does() -> None:
    torch.manual_seed(0)
    model = GPT(512, 256, num_layers=8, num_heads=4, width=128)
    residual = [module.output.weight for module in model.modules() if isinstance(module, Attention | FeedForward)]
    assert len(residual) == 2 * 8
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scaled = any(parameter is weight for weight in residual)
            expected = 0.02 / math.sqrt(2 * 8) if scaled else 0.02
            # The standard error of a standard deviation from n draws is std / sqrt(2 n).
            tolerance = 5 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(expected, rel=tolerance), name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_gpt_starts_out_close_to_uniform() -> None:
    tokens, targets = torch.randint(11, (2, 64, 16))
    loss = nn.functional.cross_entropy(small_gpt()(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(11), abs=0.05)


def test_gpt_drops_in_training_only() -> None:
    model, tokens = small_gpt(dropout=0.3), torch.randint(11, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_gpt_refuses_a_sequence_longer_than_its_context() -> None:
    with pytest.raises(ValueError, match="17 tokens exceed context_length=16"):
        small_gpt()(torch.zeros(1, 17, dtype=torch.int64))


# Arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, [8], 1), "in_features=0"),
        (lambda: MLP(4, [8, 0], 1), r"hidden=\[8, 0\]"),
        (lambda: MLP(4, [8], 1, activation="rleu"), "activation='rleu': use one of gelu, relu"),
        (lambda: MLP(4, [8], 1, dropout=1.0), "dropout=1.0"),
        (lambda: ConvNet(1, [], 10), r"channels=\[\]"),
        (lambda: ConvNet(1, [8], 0), "num_classes=0"),
        (lambda: ConvNet(1, [8], 10, dropout=-0.1), "dropout=-0.1"),
        (lambda: GPT(0, 8, num_layers=1, num_heads=1, width=8), "vocab_size=0"),
        (lambda: GPT(9, 8, num_layers=0, num_heads=1, width=8), "num_layers=0"),
        (lambda: GPT(9, 8, num_layers=1, num_heads=3, width=8), "width=8 .* num_heads=3"),
        (lambda: GPT(9, 8, num_layers=1, num_heads=1, width=8, dropout=2.0), "dropout=2.0"),
    ],
)
def test_an_impossible_argument_is_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
