"""A convolutional classifier for small images, with batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Classify small images, such as 8x8 or 28x28.

    Each stage is convolution, batch normalisation (Ioffe and Szegedy 2015), ReLU. Every stage but
    the first halves height and width, rounding up; the mean over the remaining positions feeds
    one linear layer. So images may have any height and width.

    Downsampling is by stride and pooling is by ``mean``, because the backward passes of several
    pooling layers are nondeterministic on a GPU
    (https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html).

    Args:
        in_channels: colour channels of an image.
        channels: output channels of each stage in order.
        num_classes: number of classes.
        dropout: probability of zeroing a feature before the linear layer while training.

    Raises:
        ValueError: a size is below 1, there is no stage, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        channels: list[int],
        num_classes: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels=[]: give the output channels of at least one stage")
        if min(in_channels, *channels, num_classes) < 1:
            raise ValueError(
                f"in_channels={in_channels}, channels={channels}, num_classes={num_classes}: "
                "every size must be at least 1"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout={dropout}: it must be at least 0 and below 1")

        stage_inputs = [in_channels, *channels[:-1]]
        self.stages = nn.Sequential(
            *(
                _stage(inputs, outputs, stride=1 if index == 0 else 2)
                for index, (inputs, outputs) in enumerate(zip(stage_inputs, channels, strict=True))
            )
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the class scores of each image.

        Args:
            images: (batch, in_channels, height, width) float.

        Returns:
            logits: (batch, num_classes) float.
        """
        features = self.stages(images).mean(dim=(2, 3))
        logits: Tensor = self.head(self.dropout(features))
        return logits


def _stage(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    # The convolution has no bias: batch normalisation subtracts the mean, which would cancel it.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
