"""ONNX files of students: int8, the record in the file, and the file as an upstream of stage one."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from click.testing import CliRunner
from onnx import TensorProto, helper

from extract.__main__ import main
from extract.base.errors import RetortError
from extract.corpus import Corpus
from extract.macs import count_macs
from extract.measures import CompareFile
from extract.onnx_file import KEY
from extract.speed import SpeedConfig, SpeedRequest, count_sizes
from extract.store.reader import StoreReader
from extract.upstream.card import find_upstream
from extract.upstream.load import load_upstream
from tests.test_modeling import make, waveforms
from train.__main__ import main as train_main
from train.export import export_onnx
from train.modeling_retort import RetortStudent
from train.student_folder import save_student


@torch.no_grad()
def states_of(student: RetortStudent, waveform: torch.Tensor) -> np.ndarray:
    """Return all hidden states of the student alone, float32 (L, T, D)."""
    return torch.cat(student(waveform[None], output_hidden_states=True).hidden_states).numpy()


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[RetortStudent, Path, Path]:
    """A gendistiller, its file in float32 and that in int8."""
    folder, model = tmp_path_factory.mktemp("exported"), make("gendistiller", do_normalize=True)
    save_student(folder / "student", model, {})
    for option in ([], ["--int8"]):
        done = CliRunner().invoke(train_main, ["export", str(folder / "student"), *option])
        assert done.exit_code == 0, done.output
    assert sorted(path.name for path in folder.iterdir()) == ["student", "student.int8.onnx", "student.onnx"]
    return model, folder / "student.onnx", folder / "student.int8.onnx"


def test_int8_holds_each_matrix_once_and_leaves_convolutions(student: tuple[RetortStudent, Path, Path]) -> None:
    model, _, path = student
    graph = onnx.load(path).graph
    onnx.checker.check_model(str(path), full_check=True)
    kinds = {one.name: (one.data_type, list(one.dims)) for one in graph.initializer}
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    matrices = sorted(list(dims) for kind, dims in kinds.values() if kind == TensorProto.INT8 and len(dims) == 2)
    assert matrices == sorted(list(module.weight.T.shape) for module in linear)  # though three layers use each
    products = [node for node in graph.node if node.op_type == "MatMulInteger"]
    assert len(products) == 3 * (len(linear) - 1) + 1  # the stem's projection runs once
    float_matrices = [dims for kind, dims in kinds.values() if kind == TensorProto.FLOAT and len(dims) == 2]
    assert all(1 in dims for dims in float_matrices)  # norms alone
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 8 and all(kinds[node.input[1]][0] == TensorProto.FLOAT for node in convolutions)


@pytest.mark.parametrize("int8", [False, True])
def test_features_are_the_students(student: tuple[RetortStudent, Path, Path], int8: bool) -> None:
    model, *files = student
    card = find_upstream(str(files[int8]))
    assert (card.name, card.family, card.normalise) == (files[int8].name, "onnx", True)
    upstream = load_upstream(card)
    assert upstream.facts.num_parameters == sum(one.numel() for one in model.parameters())
    rows = waveforms(400, 9_999, 5_123)
    for waveform, found in zip(rows, upstream.features([row.numpy() for row in rows], [0, 2, 3]), strict=True):
        normalised = (waveform - waveform.mean()) / torch.sqrt(waveform.var(unbiased=False) + 1e-7)
        expected = states_of(model, normalised)[[0, 2, 3]]
        assert found.hidden_LTD.shape == expected.shape
        if int8:
            error = np.square(found.hidden_LTD - expected).sum() / np.square(expected).sum()
            assert 1e-6 < error < 1e-2  # 60 to 20 dB
        else:
            np.testing.assert_allclose(found.hidden_LTD, expected, rtol=0, atol=1e-4)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_file_is_a_row_of_stores_similarity_and_sizes(
    student: tuple[RetortStudent, Path, Path], corpus: Corpus, tmp_path: Path
) -> None:
    model, *files = student
    params = tmp_path / "params.yaml"
    value = {
        "upstreams": {name: {"source": str(path)} for name, path in zip(("wide", "narrow"), files, strict=True)},
        "features": {"noise": "frames,pooled"},
        "store": {"root": str(tmp_path / "stores"), "codec": "float16", "pack_frames": 128, "shard_packs": 2},
    }
    params.write_text(yaml.safe_dump(value))
    for name in ("wide", "narrow"):
        run("many", "--config", params, "--upstream", name, "--corpora", corpus.path.parent, "--out", tmp_path / "made")
    stores = [tmp_path / f"made/{name}/noise.json" for name in ("wide", "narrow")]
    wide, narrow = (StoreReader.open(path).hidden("u003") for path in stores)
    assert wide.shape == narrow.shape and 0 < np.abs(wide - narrow).max() < 0.2 * np.abs(wide).max()
    run("compare", *stores, "--corpus", corpus.path, "--out", tmp_path / "cka.json")
    assert np.diag(np.array(CompareFile.read(tmp_path / "cka.json").linear_cka)).min() > 0.95
    sources = {name: str(path) for name, path in zip(("wide", "narrow"), files, strict=True)}
    audio = SpeedConfig(corpus=str(corpus.path), split="test", audio_seconds=1, threads=1, rounds=1)
    sizes = count_sizes(SpeedRequest(sources=sources, audio=audio, device="cpu", trust_remote_code=False))
    second = partial(model, torch.zeros(1, 16_000), output_hidden_states=True)
    assert sizes["wide"] == sizes["narrow"] == (sum(one.numel() for one in model.parameters()), count_macs(second))


def foreign(path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    copied = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "other", [value], [copied])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def changed(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        graph = onnx.load(path)
        helper.set_model_props(graph, {KEY: json.dumps(json.loads(graph.metadata_props[0].value) | changes)})
        onnx.save(graph, path)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign, "has no entry 'retort' in its metadata"),
        (lambda path: path.write_bytes(path.read_bytes()[:5_000]), "can't be opened by onnxruntime"),
        (lambda path: path.unlink(), "does not exist; `python -m train export FOLDER` writes such a file"),
        (changed(num_layers=9), "its record and its graph differ"),
        (changed(dim=True), "dim: got True, expected int"),
        (changed(sample_rate_hz=8_000), "sample_rate_hz: got 8000, expected 16000"),
        (changed(hop_samples=640), "frames for"),
    ],
)
def test_other_files_are_one_line(
    student: tuple[RetortStudent, Path, Path],
    corpus: Corpus,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "copy.onnx"
    path.write_bytes(student[1].read_bytes())
    damage(path)
    check_refused(tmp_path, corpus, path, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "bf16"), "is run in the precision of its export; give --dtype fp32"),
        (("--keep", "pooled,stem"), "has no convolution stem"),
        (("--initial-blocks", "1"), "has no blocks"),
        (("--layers", "0,4"), "has no layer 4; it has 0 to 3"),
    ],
)
def test_options_that_a_file_does_not_have_are_one_line(
    student: tuple[RetortStudent, Path, Path], corpus: Corpus, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    check_refused(tmp_path, corpus, student[1], message, *options)


def check_refused(tmp_path: Path, corpus: Corpus, upstream: Path, message: str, *options: str) -> None:
    arguments = ("--upstream", upstream, "--corpus", corpus.path, "--manifest", tmp_path / "m.json")
    store = ("--store", tmp_path / "stores", "--pack-frames", "128")
    done = CliRunner().invoke(main, ["run", *map(str, (*arguments, *store, *options))])
    assert done.exit_code == 1 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "m.json").exists() and not (tmp_path / "stores").exists()


def test_a_student_that_int8_does_not_represent_is_refused(tmp_path: Path) -> None:
    """One large weight takes the range of its column, and one large feature that of the batch."""
    model = make("distilhubert")
    with torch.no_grad():
        model.encoder.layers[0].feed_forward.intermediate_dense.bias[0] = 1e6
        model.encoder.layers[0].feed_forward.output_dense.weight[:, 0] = 0
    save_student(tmp_path / "student", model, {})
    with pytest.raises(RetortError, match=r"student: int8 leaves .* dB, expected 20 dB or more"):
        export_onnx(tmp_path / "student", tmp_path / "student.onnx", int8=True)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
