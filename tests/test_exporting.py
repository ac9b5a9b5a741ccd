import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoq.candidates import parse
from autoq.errors import InputError, PlanError
from autoq.exporting import TARGETS, export
from autoq.plan import Plan
from autoq.ties import checked

ATTENTION = "model.layers.{}.self_attn.{}_proj"
MLP = "model.layers.{}.mlp.{}_proj"


def block(number, attention="int8wo", mlp="int4wo-hqq(group_size=64)", out="int8wo"):
    names = {ATTENTION.format(number, role): attention for role in "qkv"} | {ATTENTION.format(number, "o"): out}
    return names | {MLP.format(number, role): mlp for role in ("gate", "up")} | {MLP.format(number, "down"): "none"}


def known(layers, k=128, dtype="bfloat16"):
    """A plan that knows its layers' widths."""
    shapes = {name: {"n": 64, "k": k, "dtype": dtype} for name in layers}
    return Plan(layers=layers, provenance={"model": {"class": "M", "layers": shapes}})


def test_torchao_gets_a_config_per_layer_by_its_full_name():
    found = export(Plan(layers=block(0) | {"lm_head": "int8dq"}), "torchao")
    value = json.loads(found.text)
    assert (value["_type"], value["_version"]) == ("FqnToConfig", 1)
    configs = value["_data"]["fqn_to_config"]
    row = {"granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}}
    fused = ["model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"]
    assert list(configs) == [*block(0), "lm_head", *fused]
    assert configs[ATTENTION.format(0, "q")] == {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": row}
    assert configs["lm_head"] == {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": row}
    assert configs[MLP.format(0, "down")] is None
    assert configs[MLP.format(0, "up")]["_data"] == {
        "group_size": 64,
        "int4_packing_format": {"_type": "Int4PackingFormat", "_data": "TILE_PACKED_TO_4D"},
        "int4_choose_qparams_algorithm": {"_type": "Int4ChooseQParamsAlgorithm", "_data": "HQQ"},
    }
    assert found.filename == "torchao.json"
    assert any("CUDA" in note for note in found.notes)
    assert any("include_input_output_embeddings=True" in note for note in found.notes)


def test_vllm_finds_the_layers_that_it_runs_as_one():
    """It looks up the name that the fused layer has there, and takes one it does not find for unquantized."""
    layers = block(0) | {"encoder.layer.0.attention.self." + role: "int8dq" for role in ("query", "key", "value")}
    compressed = dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"), "int8wo")
    layers |= {f"model.layers.1.self_attn.{role}": scheme for role, scheme in compressed.items()}
    configs = json.loads(export(Plan(layers=layers), "torchao").text)["_data"]["fqn_to_config"]
    assert {name: configs[name] for name in configs if name not in layers} == {
        "model.layers.0.self_attn.qkv_proj": configs[ATTENTION.format(0, "k")],
        "model.layers.0.mlp.gate_up_proj": configs[MLP.format(0, "up")],
        "encoder.layer.0.attention.self.qkv_proj": configs["encoder.layer.0.attention.self.key"],
        "model.layers.1.self_attn.fused_qkv_a_proj": configs["model.layers.1.self_attn.q_a_proj"],
    }


def test_torchao_is_not_given_layers_that_it_cannot_run():
    for name in ("transformer.h.0.attn.c_attn", "h.11.mlp.c_fc", "transformer.h.2.crossattention.q_attn"):
        with pytest.raises(PlanError, match=r"torchao quantizes nn\.Linear; got a Conv1D of transformers.*addmm"):
            export(Plan(layers={name: "int8wo"}), "torchao")
        assert json.loads(export(Plan(layers={name: "none"}), "torchao").text)["_data"]["fqn_to_config"] == {name: None}
        assert name.replace(".", "\\\\.") in export(Plan(layers={name: "int8wo"}), "gptqmodel").text
    linear = Plan(layers={"transformer.h.0.attn.c_attn": "int8wo"}, provenance={"model": {"class": "GPTBigCodeModel"}})
    assert '"Int8WeightOnlyConfig"' in export(linear, "torchao").text


@pytest.fixture(scope="module")
def torchao():
    """torchao from a folder of its own: installed, transformers would import it at every start."""
    place, before = Path(sys.prefix) / "torchao", set(sys.modules)
    sys.path.insert(0, str(place))
    try:
        yield pytest.importorskip("torchao.core.config"), pytest.importorskip("torchao.quantization")
    finally:
        sys.path.remove(str(place))
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchao":
                del sys.modules[name]


def test_torchao_itself_reads_the_config_back(torchao):
    core, quantization = torchao
    plan = Plan(layers=block(0) | {"lm_head": "int8dq"})
    config = core.config_from_dict(json.loads(export(plan, "torchao").text))
    assert type(config) is quantization.FqnToConfig
    configs = config.fqn_to_config
    assert list(configs)[: len(plan.layers)] == list(plan.layers)
    assert configs[ATTENTION.format(0, "q")] == quantization.Int8WeightOnlyConfig()
    assert configs["lm_head"] == quantization.Int8DynamicActivationInt8WeightConfig()
    assert configs[MLP.format(0, "down")] is None
    assert configs[MLP.format(0, "up")].group_size == 64
    assert configs[MLP.format(0, "up")].int4_choose_qparams_algorithm == "hqq"
    again = json.loads(json.dumps(core.config_to_dict(config)))
    assert core.config_from_dict(again) == config


@pytest.mark.parametrize("scheme", ["int8wo", "int8dq"])
def test_torchao_quantizes_a_layer_to_the_same_weight(torchao, scheme):
    core, quantization = torchao
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False), torch.nn.Linear(128, 64, bias=False))
    left, weight = model[1].weight, model[0].weight.detach().clone()
    plan = Plan(layers={"0": scheme, "1": "none", **dict.fromkeys(("gate_proj", "up_proj"), scheme)})
    config = core.config_from_dict(json.loads(export(plan, "torchao").text))  # names of no layer are no mistake
    quantization.quantize_(model, config, filter_fn=None)
    candidate = parse(scheme)
    ours = candidate.unpack(candidate.pack(weight))
    theirs = model[0].weight.dequantize().float()
    assert model[1].weight is left
    step = weight.abs().amax(1, keepdim=True) / 127
    # The same grid but for rounding of the scale: far below the half step that rounding to it costs.
    assert ((ours - theirs).abs() / step).max() <= 1.01
    assert ((ours - theirs).norm() / weight.norm()) < 2e-3


THROUGH_TRANSFORMERS = """
import json, sys, torch
sys.path.insert(0, {place!r})
from torchao.core.config import config_from_dict
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig
sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).save_pretrained({folder!r})
wanted = TorchAoConfig(config_from_dict(json.load(open({config!r}))), include_input_output_embeddings=True)
model = AutoModelForCausalLM.from_pretrained({folder!r}, quantization_config=wanted)
layers = [(name, one.weight) for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
print(json.dumps([name for name, weight in layers if type(weight) is not torch.nn.Parameter]))
"""


def test_transformers_quantizes_what_the_config_names(torchao, tmp_path):
    layers = {name: "none" if name.endswith("o_proj") else "int8wo" for name in block(0)} | {"lm_head": "int8wo"}
    (tmp_path / "torchao.json").write_text(export(Plan(layers=layers), "torchao").text)
    place = str(Path(torchao[0].__file__).parents[2])
    code = THROUGH_TRANSFORMERS.format(
        place=place, folder=str(tmp_path / "model"), config=str(tmp_path / "torchao.json")
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert sorted(found) == sorted(name for name in layers if layers[name] != "none")


def test_gptqmodel_gets_patterns_of_which_the_first_that_matches_counts():
    found = export(Plan(layers=block(0) | block(10, attention="none", out="none") | {"lm_head": "int8wo"}), "gptqmodel")
    value = json.loads(found.text)

    def settings(name):
        """As GPTQModel's ``dynamic_get`` looks a module up: False excludes it."""
        for pattern, one in value["dynamic"].items():
            if re.match(pattern[2:], name):
                return False if pattern.startswith("-:") else one
        raise AssertionError(name)

    eight, four = {"bits": 8, "group_size": -1, "sym": True}, {"bits": 4, "group_size": 64, "sym": False}
    assert settings(ATTENTION.format(0, "q")) == settings("lm_head") == eight
    assert settings(MLP.format(0, "up")) == settings(MLP.format(10, "gate")) == four
    assert settings(ATTENTION.format(10, "q")) is settings(MLP.format(0, "down")) is False
    # vLLM looks up the name that the layers have there together.
    assert settings("model.layers.0.self_attn.qkv_proj") == eight
    assert settings("model.layers.10.mlp.gate_up_proj") == four
    assert settings("model.layers.10.self_attn.qkv_proj") is False
    assert settings("modelXlayers.0.mlp.up_proj") is settings(MLP.format(0, "up") + ".extra") is False
    assert {key: value[key] for key in four} == eight
    assert value["lm_head"] is True
    assert any("refuses an lm_head that is tied" in note for note in found.notes)
    assert found.filename == "gptqmodel.json"


def test_llamacpp_gets_an_anchored_pattern_for_each_role_and_type():
    layers = block(0) | block(1) | block(10, attention="none", out="none") | {"lm_head": "int8dq"}
    found = export(known(layers, dtype="float16"), "llama.cpp")
    assert found.text.splitlines() == [
        "--tensor-type ^blk[.](0|1)[.]attn_q[.]weight$=q8_0",
        "--tensor-type ^blk[.](0|1)[.]attn_k[.]weight$=q8_0",
        "--tensor-type ^blk[.](0|1)[.]attn_v[.]weight$=q8_0",
        "--tensor-type ^blk[.](0|1)[.]attn_output[.]weight$=q8_0",
        "--tensor-type ^blk[.](0|1|10)[.]ffn_gate[.]weight$=q4_1",
        "--tensor-type ^blk[.](0|1|10)[.]ffn_up[.]weight$=q4_1",
        "--tensor-type ^blk[.](0|1|10)[.]ffn_down[.]weight$=f16",
        "--tensor-type ^blk[.](10)[.]attn_q[.]weight$=f16",
        "--tensor-type ^blk[.](10)[.]attn_k[.]weight$=f16",
        "--tensor-type ^blk[.](10)[.]attn_v[.]weight$=f16",
        "--tensor-type ^blk[.](10)[.]attn_output[.]weight$=f16",
        "--tensor-type ^output[.]weight$=q8_0",
    ]
    patterns = [line.split()[1].partition("=")[0] for line in found.text.splitlines()]
    assert [one for one in patterns if re.search(one, "blk.1.attn_q.weight")] == patterns[:1]
    assert not [one for one in patterns if re.search(one, "blk.11.attn_q.weight")]
    assert any("--token-embedding-type" in note for note in found.notes)


def test_names_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    from autoq import export_llamacpp

    arches = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    others = {"mistral": "llama", "mixtral": "llama", "gpt_neox": "gptneox", "phi": "phi2"}
    others |= {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
    seen = 0
    for model_type, (blocks, roles) in export_llamacpp._MODELS.items():
        names = gguf.get_tensor_name_map(arches[others.get(model_type, model_type)], 3)
        prefix = blocks.removeprefix("bert.")
        for role, ours in roles.items():
            # One tensor holds the experts: its name is that of the module without their numbers.
            theirs = names.get_name(f"{prefix}.2.{role.replace('.*.', '.')}")
            if theirs is None:
                assert "expert" in role, (model_type, role)
                continue
            assert theirs == f"blk.2.{ours}", (model_type, role)
            seen += 1
    assert seen >= 80


FUSED = {
    "q, k and v": ({ATTENTION.format(0, "v"): "int8dq"}, "(.*)\\.(?:q_proj|k_proj|v_proj)", "3 layers as one"),
    "gate and up": ({MLP.format(0, "up"): "none"}, "(.*)\\.(?:gate_proj|up_proj)", "2 layers as one"),
}


@pytest.mark.parametrize("target", ["torchao", "gptqmodel"])
@pytest.mark.parametrize("name", FUSED)
def test_layers_that_servers_fuse_need_one_scheme(name, target):
    change, pattern, says = FUSED[name]
    with pytest.raises(PlanError, match=says) as caught:
        export(Plan(layers=block(0) | change), target)
    assert f"ties={pattern!r}" in str(caught.value)
    assert checked(pattern) == (pattern,)
    group = [one for one in block(0) if re.fullmatch(pattern, one)]
    assert next(iter(change)) in group
    assert f"$.layers[{json.dumps(group[0])}]" in str(caught.value)
    assert all(one in str(caught.value) for one in group)


def test_a_layer_that_the_plan_does_not_name_is_not_quantized_and_so_differs():
    layers = {name: scheme for name, scheme in block(0).items() if not name.endswith("k_proj")}
    with pytest.raises(PlanError, match=r"int8wo: model\.layers\.0\.self_attn\.q_proj, .*none: .*k_proj"):
        export(Plan(layers=layers), "torchao")


def test_compressed_keys_are_not_fused_with_queries():
    names = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")
    plan = Plan(layers={f"model.layers.0.self_attn.{one}": "int8wo" for one in names})
    assert len(json.loads(export(plan, "torchao").text)["_data"]["fqn_to_config"]) == 3


def test_all_experts_of_a_block_have_one_scheme():
    names = [f"model.layers.0.mlp.experts.{e}.{role}_proj" for e in (0, 1) for role in ("gate", "up", "down")]
    plan = Plan(layers=dict.fromkeys(names, "int8wo"))
    dynamic = json.loads(export(plan, "gptqmodel").text)["dynamic"]
    assert list(dynamic)[6:] == ["+:^model\\.layers\\.0\\.mlp\\.experts$", "-:.*"]  # vLLM looks up the block's name
    assert list(json.loads(export(plan, "torchao").text)["_data"]["fqn_to_config"]) == names
    assert export(plan, "llama.cpp", model_type="qwen3_moe").text.splitlines() == [
        f"--tensor-type ^blk[.](0)[.]ffn_{role}_exps[.]weight$=q8_0" for role in ("gate", "up", "down")
    ]
    mixed = plan.replace({names[3]: "none"})
    with pytest.raises(PlanError, match="6 layers as one") as caught:
        export(mixed, "torchao")
    assert "siblings" not in str(caught.value)  # those of an expert's down_proj are not tied to its gate_proj
    pattern = re.search(r"ties='(.*?)' ", str(caught.value))[1].replace("\\\\", "\\")
    assert len({re.fullmatch(pattern, name).groups() for name in names}) == 1
    with pytest.raises(PlanError, match=r"experts\.1\.gate_proj.*one tensor in a GGUF file.*bf16, and q8_0 for"):
        export(mixed, "llama.cpp")


def test_layers_of_split_experts_are_two_tensors_in_gguf_and_unknown_elsewhere():
    experts = [f"model.layers.0.mlp.experts.{e}.{role}" for e in (0, 1) for role in ("gate_up_proj", "down_proj")]
    plan = Plan(layers=dict.fromkeys(experts, "int8wo"))
    for model_type in ("mixtral", "qwen3_moe", None):
        assert export(plan, "llama.cpp", model_type=model_type).text.splitlines() == [
            f"--tensor-type ^blk[.](0)[.]ffn_{role}_exps[.]weight$=q8_0" for role in ("gate", "up", "down")
        ]
    with pytest.raises(PlanError, match=r"experts\.1\.gate_up_proj.*one tensor in a GGUF file.*bf16, and q8_0 for"):
        export(plan.replace({experts[2]: "none"}), "llama.cpp")
    for target in ("torchao", "gptqmodel"):
        with pytest.raises(
            PlanError, match=r"experts\.0\.gate_up_proj.*got an expert's layer that autoq.split_experts"
        ):
            export(plan, target)
    alone = Plan(layers=dict.fromkeys(experts, "none") | {"lm_head": "int8wo"})
    assert '"lm_head"' in export(alone, "torchao").text


def test_the_notes_say_what_llama_quantize_ignores():
    found = export(
        Plan(layers={"model.layers.0.mlp.shared_expert_gate": "int8wo"}), "llama.cpp", model_type="qwen2_moe"
    )
    assert any("leaves routers" in note for note in found.notes)
    found = export(Plan(layers=block(0)), "llama.cpp")
    assert not any("routers" in note for note in found.notes)
    assert any("has to be q8_0" in note for note in found.notes)


MISSING = {
    "torchao": {
        "sinq(bits=4,group_size=64)": "column factors",
        "fp6(format=e3m2)": "6-bit floats",
        "int4dq(group_size=64,method=hqq)": "under int8 activations",
        "int8mix(m_switch=16)": "one scheme for all row counts",
        "int4mix(group_size=64,m_switch=16,method=hqq)": "one scheme for all row counts",
    },
    "gptqmodel": {
        "sinq(bits=4,group_size=64)": "column factors",
        "fp6(format=e3m2)": "integer codes only",
        "int8dq": "activations in 16 bits",
        "int4dq(group_size=64,method=hqq)": "activations in 16 bits",
        "int8mix(m_switch=16)": "activations in 16 bits",
    },
    "llama.cpp": {
        "sinq(bits=4,group_size=64)": "column factors",
        "fp6(format=e2m3)": "no 6-bit floats",
        "int4dq(group_size=64,method=sinq)": "column factors",
    },
}


@pytest.mark.parametrize(("target", "scheme"), [(target, one) for target, all_ in MISSING.items() for one in all_])
def test_a_scheme_that_the_program_lacks_is_refused_by_name(target, scheme):
    with pytest.raises(PlanError, match=MISSING[target][scheme]) as caught:
        export(Plan(layers={"lm_head": scheme}), target)
    assert caught.value.got == scheme
    assert str(caught.value).startswith('$.layers["lm_head"]: ')


def test_mixes_and_dynamic_schemes_of_plain_codes_have_a_type_in_gguf():
    layers = {ATTENTION.format(0, "q"): "int8mix", ATTENTION.format(0, "k"): "int4mix(method=hqq)"}
    text = export(Plan(layers=layers | {ATTENTION.format(0, "v"): "int4dq(method=hqq)"}), "llama.cpp").text
    assert re.findall(r"attn_(.).weight\$=(\w+)", text.replace("[.]", ".")) == [
        ("q", "q8_0"),
        ("k", "q4_1"),
        ("v", "q4_1"),
    ]


@pytest.mark.parametrize(
    ("target", "scheme", "k"),
    [
        ("torchao", "int4wo-hqq(group_size=128)", 192),
        ("gptqmodel", "int4wo-hqq(group_size=64)", 96),
        ("llama.cpp", "int8wo", 40),
    ],
)
def test_inputs_are_whole_groups(target, scheme, k):
    with pytest.raises(PlanError, match=rf"needs inputs in whole groups of \d+; got {k} inputs"):
        export(known({"lm_head": scheme}, k=k), target)


def test_a_layer_without_a_name_in_gguf_is_refused():
    for name in ("vision_tower.encoder.layers.0.self_attn.q_proj", "classifier", "model.layers.0.self_attn.x_proj"):
        with pytest.raises(PlanError, match="has a known name in GGUF files"):
            export(Plan(layers={name: "int8wo"}), "llama.cpp")
    with pytest.raises(PlanError, match="known name"):
        export(Plan(layers={"transformer.h.0.attn.c_attn": "int8wo"}), "llama.cpp", model_type="llama")
    with pytest.raises(InputError, match=r"the model type is one whose GGUF names are known; got 'lama'"):
        export(Plan(layers={"lm_head": "int8wo"}), "llama.cpp", model_type="lama")


def test_names_of_a_base_model_lack_its_own():
    for name, tensor in {
        "layers.3.mlp.up_proj": "blk[.](3)[.]ffn_up",
        "h.0.attn.c_attn": "blk[.](0)[.]attn_qkv",
        "bert.encoder.layer.1.attention.self.key": "blk[.](1)[.]attn_k",
        "encoder.layer.1.output.dense": "blk[.](1)[.]ffn_down",
    }.items():
        text = export(Plan(layers={name: "int8wo"}), "llama.cpp").text
        assert text == f"--tensor-type ^{tensor}[.]weight$=q8_0\n"


def test_a_target_must_be_known_and_a_plan_quantize_something():
    with pytest.raises(InputError, match=r"got 'onnx'. Choose torchao, gptqmodel, llama\.cpp\."):
        export(Plan(layers={}), "onnx")
    with pytest.raises(PlanError, match="at least one layer"):
        export(Plan(layers={"lm_head": "none"}), "gptqmodel")


def test_exports_need_no_torch():
    code = (
        "import sys; from autoq.exporting import export; from autoq.plan import Plan\n"
        f"for target in {TARGETS!r}: export(Plan(layers={{'lm_head': 'int8wo'}}), target)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
