"""Hugging Face folders with quantized matrices, written as published ones are, and the values of their matrices."""

import json

import torch
from safetensors.torch import load_file, save_file
from small import hugging_face

GROUP = 32


def words(numbers, bits, dim):
    """Unsigned numbers, packed along `dim` into words of 32 bits, the first in the lowest bits."""
    numbers, per = numbers.long().movedim(dim, -1), 32 // bits
    short = -numbers.shape[-1] % per
    numbers = torch.nn.functional.pad(numbers, (0, short)).unflatten(-1, (-1, per))
    total = sum(numbers[..., i] << bits * i for i in range(per))
    return torch.where(total >= 2**31, total - 2**32, total).int().movedim(-1, dim).contiguous()


def rounded(weight, bits, group, generator, off=2):
    """Unsigned numbers (out, in), scales and zeros (out, groups) near a matrix, and scale * (q - zero). Zeros are up to
    `off` from the middle."""
    groups = weight.unflatten(1, (-1, group))
    scale = (groups.amax(-1) - groups.amin(-1)).div(2**bits - 1).half()
    zero = 2 ** (bits - 1) + torch.randint(-off, off + 1, scale.shape, generator=generator)
    q = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    return q.flatten(1), scale, zero, ((q - zero[..., None]) * scale[..., None].float()).flatten(1)


def gptq(weight, generator, bits=4, group=GROUP, version="gptq", order=None):
    out, columns = weight.shape
    order = torch.arange(columns) if order is None else torch.randperm(columns, generator=generator)
    q, scale, zero, values = rounded(weight[:, order], bits, group or columns, generator)
    back = order.argsort()
    stored = (zero - int(version == "gptq")) & 2**bits - 1
    tensors = {
        "qweight": words(q[:, back], bits, 1).T.contiguous(),
        "qzeros": words(stored, bits, 0).T.contiguous(),
        "scales": scale.T.contiguous(),
        "g_idx": (back // (group or columns)).int(),
        "bias": torch.zeros(out, dtype=torch.float16),
    }
    return tensors, values[:, back]


AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]  # the column in each of the eight places of a word


def awq(weight, generator):
    q, scale, zero, values = rounded(weight, 4, GROUP, generator)

    def packed(numbers):
        places = numbers.T.unflatten(1, (-1, 8))[..., AWQ_PLACES].flatten(1)
        return words(places, 4, 1)

    return {"qweight": packed(q), "qzeros": packed(zero), "scales": scale.T.contiguous()}, values


def compressed(weight, generator, bits=4, group=GROUP, symmetric=True):
    q, scale, zero, values = rounded(weight, bits, group, generator, 0 if symmetric else 2)
    tensors = {"weight_packed": words(q, bits, 1), "weight_shape": torch.tensor(weight.shape), "weight_scale": scale}
    return {**tensors, **({} if symmetric else {"weight_zero_point": words(zero, bits, 0)})}, values


def int8(weight, generator, zeros=False):
    scale = weight.abs().amax(1, keepdim=True).div(120)
    zero = torch.randint(-5, 6, scale.shape, generator=generator) if zeros else torch.zeros_like(scale)
    q = (weight / scale + zero).round().clamp(-128, 127)
    tensors = {"weight": q.to(torch.int8), "weight_scale": scale.bfloat16()}
    tensors |= {"weight_zero_point": zero.to(torch.int8)} if zeros else {}
    return tensors, (q - zero) * scale.bfloat16().float()


def llm_int8(weight, generator):
    largest = weight.abs().amax(1)
    q = (weight / largest[:, None] * 127).round()
    weight_format = torch.tensor(0, dtype=torch.uint8)
    return {"weight": q.to(torch.int8), "SCB": largest, "weight_format": weight_format}, q * largest[:, None] / 127


def float8(weight, generator, by="row", name="weight_scale", dtype=torch.float8_e4m3fn):
    out, columns = weight.shape
    if by == "block":
        scale = torch.rand(-(-out // 128), -(-columns // 128), generator=generator) / 100 + 0.001
        wide = scale.repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :columns]
    elif by == "row":
        scale = wide = weight.abs().amax(1, keepdim=True) / 448
    else:
        scale = wide = weight.abs().amax() / 448
    q = (weight / wide).clamp(-448, 448).to(dtype)
    return {"weight": q, name: scale, "input_scale": torch.tensor(1.0)}, q.float() * wide


def powers(scale):
    """Powers of two above scales, as the bytes of their exponents, and their values."""
    exponent = scale.log2().ceil()
    return (exponent + 127).to(torch.uint8), torch.exp2(exponent)


def mxfp8(weight, generator):
    groups = weight.unflatten(1, (-1, GROUP))
    stored, scale = powers(groups.abs().amax(-1) / 448)
    q = (groups / scale[..., None]).to(torch.float8_e4m3fn)
    return {"weight": q.flatten(1), "weight_scale": stored}, (q.float() * scale[..., None]).flatten(1)


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def fp4(weight, generator, kind="nvfp4"):
    """NVFP4, as compressed-tensors or ModelOpt writes it, or MXFP4."""
    groups = weight.unflatten(1, (-1, 32 if kind == "mxfp4" else 16))
    scale = groups.abs().amax(-1) / 6
    common = scale.amax() / 448
    if kind == "mxfp4":
        stored, scale = powers(scale)
    else:
        stored = (scale / common).to(torch.float8_e4m3fn)
        scale = stored.float() * common
    values = groups / scale[..., None]
    q = (values.abs()[..., None] - FP4).abs().argmin(-1)
    values = torch.where(values < 0, -FP4[q], FP4[q]) * scale[..., None]
    q = (q + 8 * (groups < 0)).flatten(1).to(torch.uint8)
    weight = q[:, 0::2] | q[:, 1::2] << 4
    if kind == "modelopt":
        tensors = {"weight": weight, "weight_scale_2": common, "input_scale": torch.tensor(1.0)}
    else:
        more = {"weight_global_scale": 1 / common[None], "input_global_scale": torch.ones(1)}
        tensors = {"weight_packed": weight, **(more if kind == "nvfp4" else {})}
    return {**tensors, "weight_scale": stored}, values.flatten(1)


def four_bits(weight, generator, kind="nf4", nested=True):
    from bitsandbytes import functional as bnb

    q, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    tensors = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {"weight": q, **tensors}, bnb.dequantize_4bit(q, state).float()


def ct(format, inputs=None, **values):
    """quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **values}}
    group |= (
        {"input_activations": {**group["weights"], "symmetric": True, "strategy": "token", "dynamic": True}}
        if inputs
        else {}
    )
    status = {"quantization_status": "compressed", "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, **status}


F4 = {"num_bits": 4, "type": "float"}
W4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
# What writes a matrix, its arguments, and quantization_config.
METHODS = {
    "gptq": (gptq, {}, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}),
    "gptq of whole rows": (gptq, {"group": 0}, {"quant_method": "gptq", "bits": 4, "group_size": -1}),
    "gptq v2": (gptq, {"version": "v2"}, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "gptq of 8 bits": (gptq, {"bits": 8, "group": 128}, {"quant_method": "gptq", "bits": 8, "group_size": 128}),
    "gptq in another order": (gptq, {"order": True}, {"quant_method": "gptq", "bits": 4, "desc_act": True}),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "w4a16": (compressed, {}, ct("pack-quantized", **W4)),
    "w4a16 with zeros": (compressed, {"symmetric": False}, ct("pack-quantized", **W4 | {"symmetric": False})),
    "w4a16 in groups of 4": (compressed, {"group": 4}, ct("pack-quantized", **W4 | {"group_size": 4})),
    "w8a16": (compressed, {"bits": 8, "group": 128}, ct("pack-quantized", strategy="group", group_size=128)),
    "w8a8": (int8, {}, ct("int-quantized", True, strategy="channel")),
    "w8a8 with zeros": (int8, {"zeros": True}, ct("int-quantized", True, strategy="channel", symmetric=False)),
    "fp8 by rows": (float8, {}, ct("float-quantized", True, strategy="channel", type="float")),
    "fp8": (float8, {"by": "matrix"}, {"quant_method": "fp8"}),
    "fp8 by blocks": (
        float8,
        {"by": "block", "name": "weight_scale_inv"},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "fp8 e5m2": (float8, {"dtype": torch.float8_e5m2}, {"quant_method": "fbgemm_fp8"}),
    "mxfp8": (mxfp8, {}, ct("mxfp8-quantized", strategy="group", group_size=32, type="float")),
    "nvfp4": (fp4, {}, ct("nvfp4-pack-quantized", strategy="tensor_group", group_size=16, **F4)),
    "nvfp4 by ModelOpt": (fp4, {"kind": "modelopt"}, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "mxfp4": (fp4, {"kind": "mxfp4"}, ct("mxfp4-pack-quantized", strategy="group", group_size=32, **F4)),
    "llm.int8": (llm_int8, {}, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "nf4": (four_bits, {}, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp4": (four_bits, {"kind": "fp4", "nested": False}, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
}


def write(folder, model, method, output=False, seed=0):
    """Write a model with its matrices quantized, perhaps the `output` matrix too, in two files. Returns Hugging Face's
    model with the same values."""
    quantize, options, config = METHODS[method]
    theirs, generator = hugging_face(model.params, model.state_dict()), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, value in theirs.state_dict().items():
        if name.endswith("_proj.weight") or (output and name == "lm_head.weight"):
            parts, values = quantize(value, generator, **options)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in parts.items()}
            value.copy_(values)
        else:
            tensors[name] = value
    folder.mkdir()
    theirs.config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config, "dtype": "float32"}))
    names = sorted(tensors)  # parts of one matrix in different files
    files = {"model-00001-of-00002.safetensors": names[0::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: tensors[name].clone().contiguous() for name in held}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return theirs


def edited(folder, config, tensors):
    """Change config.json, and the tensors of all files, which become one file."""
    if config:
        path = folder / "config.json"
        found = json.loads(path.read_text())
        config(found)
        path.write_text(json.dumps(found))
    if tensors:
        found = {}
        for file in folder.glob("*.safetensors"):
            found |= load_file(file)
            file.unlink()
        tensors(found)
        (folder / "model.safetensors.index.json").unlink()
        save_file(found, folder / "model.safetensors", {"format": "pt"})


# Changes of a folder's tensors and of config.json, for `edited`


def part(name, change):
    """A change of the tensors of one matrix."""

    def edit(tensors):
        key = f"model.layers.1.mlp.up_proj.{name}"
        tensors[key] = change(tensors[key]).contiguous()

    return edit


def without(name):
    return lambda tensors: tensors.pop(f"model.layers.1.mlp.up_proj.{name}")


def settings(**changes):
    return lambda config: config["quantization_config"].update(changes)


def state(**changes):
    """A change of the numbers of bitsandbytes that describe one matrix."""

    def change(tensor):
        return torch.tensor([*json.dumps(json.loads(bytes(tensor.tolist())) | changes).encode()], dtype=torch.uint8)

    return part("weight.quant_state.bitsandbytes__nf4", change)


def groups(count):
    """A change of one matrix of GPTQ to the first groups, without their columns."""

    def edit(tensors):
        for name in ("scales", "qzeros"):
            part(name, lambda t: t[:count])(tensors)
        without("g_idx")(tensors)

    return edit


def widened(words, offset=0):
    """Words of 4-bit numbers, plus an offset, as 8-bit numbers."""
    b = words.contiguous().view(torch.uint8)
    return (torch.stack((b & 15, b >> 4), -1).flatten(1) + offset).view(torch.int32)


def both(*changes):
    return lambda tensors: [change(tensors) for change in changes]


# Folders that cannot be read: the method, changes for `edited`, and the message

SCALES = r"model\.layers\.1\.mlp\.up_proj\.scales is \(8, 767\) torch\.float16; it must be \(8, 768\)"
ERRORS = {
    "another method": ("gptq", settings(quant_method="quip"), None, "by quip are not read, only by gptq, awq, "),
    "no method": ("gptq", settings(quant_method=None), None, "by None are not read"),
    "3 bits": ("gptq", settings(bits=3), None, "by gptq with bits 3 are not read"),
    "marlin": ("gptq", settings(checkpoint_format="marlin"), None, "checkpoint_format 'marlin' are not read"),
    "gemv": ("awq", settings(version="GEMV"), None, "with version 'GEMV' are not read"),
    "mxfp6": ("w4a16", settings(format="mxfp6-pack-quantized"), None, "format 'mxfp6-pack-quantized' are not"),
    "rotated": ("w4a16", settings(transform_config={"u": 1}), None, r"transform_config {'u': 1} are not read"),
    "2 bits": ("w4a16", None, part("weight_packed", lambda t: t[:, ::2]), r"hold a matrix \(768, 256\) of 4 or 8 bits"),
    "sparse": (
        "w4a16",
        settings(sparsity_config={"format": "sparse-24-bitmask"}),
        None,
        "'sparse-24-bitmask'} are not",
    ),
    "another packing": ("gptq", settings(quant_method="auto-round"), None, "quantized by auto-round with None are not"),
    "text": ("w4a16", lambda config: config.update(quantization_config="gptq 4"), None, "quantized by gptq 4 are not"),
    "scaled inputs": ("fp8", settings(quant_method="modelopt", quant_algo="NVFP4_AWQ"), None, "quant_algo 'NVFP4_AWQ'"),
    "no scale": ("nvfp4", None, without("weight_scale"), "up_proj lacks weight_scale"),
    "no global scale": ("nvfp4", None, without("weight_global_scale"), "up_proj lacks weight_global_scale"),
    "scales of other groups": (
        "mxfp4",
        None,
        part("weight_scale", lambda t: t[:, :7]),
        "256 columns in 7 groups, which",
    ),
    "exponents beyond float16": ("mxfp4", None, part("weight_scale", lambda t: t + 40), "scales beyond the range of"),
    "float bits": ("gptq", settings(bits=4.0), None, "by gptq with bits 4.0 are not read"),
    "no groups": ("fp8 by blocks", settings(config_groups=[1]), None, r"config_groups is \[1\], not groups"),
    "a large scale": (
        "w8a8",
        None,
        part("weight_scale", lambda t: t * 1e9),
        "has scales beyond the range of float16, 65",
    ),
    "empty scales": (
        "fp8",
        None,
        part("weight_scale", lambda t: t[None][:0]),
        r"weight_scale is \(0,\) torch.float32; it",
    ),
    "columns of llm.int8": ("llm.int8", None, part("weight_format", lambda t: t + 1), "weight_format is 1; only"),
    "int16": ("nf4", None, part("weight", lambda t: t.view(1, -1).view(torch.int16)), "torch.bool; it must be"),
    "large blocks": ("nf4", None, state(blocksize=2**30), r"block sizes \[768, 256, 1073741824, 256\]"),
    "an infinite offset": ("nf4", None, state(nested_offset=float("inf")), "nested_offset inf"),
    "huge blocks": (
        "fp8 by blocks",
        settings(weight_block_size=[2**80, 1]),
        None,
        "weight_block_size is .*, not the rows",
    ),
    "no zeros of AWQ": ("awq", None, without("qzeros"), r"model\.layers\.1\.mlp\.up_proj lacks qzeros"),
    "no zero points": ("w8a8 with zeros", None, without("weight_zero_point"), "up_proj lacks weight_zero_point"),
    "no order": ("gptq in another order", None, without("g_idx"), "up_proj lacks g_idx"),
    "a number as the output matrix": (
        "fp8",
        None,
        lambda tensors: tensors.update({"lm_head.weight": torch.tensor(1.0)}),
        "the tokenizer has 1024 pieces and the weights in .* 1: not a pair",
    ),
    "no zeros": ("gptq", None, without("qzeros"), r"model\.layers\.1\.mlp\.up_proj lacks qzeros"),
    "short scales": ("gptq", None, part("scales", lambda t: t[:, :-1]), SCALES),
    "other groups": ("gptq", None, part("g_idx", lambda t: t + 7), "g_idx names groups beyond the 8 of each row"),
    "a bias": ("gptq", None, part("bias", lambda t: t + 1), r"up_proj\.bias is not zero"),
    "floats": ("gptq", None, part("qweight", lambda t: t.float()), "float32; it must be torch.int32"),
    "another shape": (
        "w4a16",
        None,
        part("weight_packed", lambda t: t[:, :-4]),
        r"weight_packed \(768, 28\) does not hold a matrix \(768, 256\)",
    ),
    "a global scale": (
        "w4a16",
        None,
        lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.weight_global_scale": torch.ones(1)}),
        r"unexpected: model\.layers\.1\.mlp\.up_proj\.weight_global_scale",
    ),
    "fewer rows": ("fp8", None, part("weight", lambda t: t[:-8]), r"misshapen: layers\.1\.feed_forward\.w3\.weight"),
    "blocks of another size": ("fp8 by blocks", settings(weight_block_size=[64, 64]), None, r"must be \(12, 4\)"),
    "groups that differ": ("gptq", None, groups(7), "up_proj has 256 columns in 7 groups, which differ in size"),
    "blocks of no size": (
        "fp8 by blocks",
        settings(weight_block_size=None),
        None,
        "_proj has scales of blocks, and weight_block_size is None",
    ),
    "no state": ("nf4", None, without("weight.quant_state.bitsandbytes__nf4"), "quant_state cannot be read"),
    "another state": (
        "nf4",
        None,
        part("weight.quant_state.bitsandbytes__nf4", lambda t: t[5:]),
        "quant_state cannot be read",
    ),
    "a short table": ("nf4", None, part("weight.quant_map", lambda t: t[:15]), r"\(15,\) torch.float32; it must be"),
}
