"""Prints nothing and writes what llama.cpp's library makes of token ids: logits, or states where a model has none.

    python llamacpp_logits.py FOLDER MODEL.gguf IDS.json OUT.npy [embeddings]

FOLDER holds libllama.so. Keys and values are kept in float32, and there is one thread.
"""

import ctypes as c
import json
import sys
from pathlib import Path

import numpy as np

F32, CPU_ONLY, NO_FLASH, NO_POOLING = 0, 0, 0, 0


class ModelParams(c.Structure):
    _fields_ = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        *((name, c.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", c.c_bool),
    ]


class ContextParams(c.Structure):
    _fields_ = [
        *((name, c.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c.c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        *((name, c.c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type", "attention_type")),
        ("flash_attn_type", c.c_int),
        *((name, c.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor")),
        *((name, c.c_float) for name in ("yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        *((name, c.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full")),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
    ]


class Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


def load(folder):
    library = c.CDLL(str(Path(folder) / "libllama.so"))
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_default_params", ModelParams, []),
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_load_from_file", c.c_void_p, [c.c_char_p, ModelParams]),
        ("llama_init_from_model", c.c_void_p, [c.c_void_p, ContextParams]),
        ("llama_model_has_encoder", c.c_bool, [c.c_void_p]),
        ("llama_model_has_decoder", c.c_bool, [c.c_void_p]),
        ("llama_model_get_vocab", c.c_void_p, [c.c_void_p]),
        ("llama_vocab_n_tokens", c.c_int32, [c.c_void_p]),
        ("llama_model_n_embd", c.c_int32, [c.c_void_p]),
        ("llama_batch_init", Batch, [c.c_int32, c.c_int32, c.c_int32]),
        ("llama_encode", c.c_int32, [c.c_void_p, Batch]),
        ("llama_decode", c.c_int32, [c.c_void_p, Batch]),
        ("llama_get_logits_ith", c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
        ("llama_get_embeddings_ith", c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def batch_of(library, ids):
    batch = library.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    return batch


def main(folder, path, ids_file, out, kind="logits"):
    ids = json.loads(Path(ids_file).read_text())
    library = load(folder)
    library.llama_backend_init()
    params = library.llama_model_default_params()
    params.n_gpu_layers, params.use_extra_bufts = CPU_ONLY, False
    model = library.llama_model_load_from_file(path.encode(), params)
    if not model:
        sys.exit(f"{path}: llama.cpp does not load it")
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = F32
    settings.flash_attn_type, settings.no_perf = NO_FLASH, True
    if kind == "embeddings":
        settings.embeddings, settings.pooling_type = True, NO_POOLING
    context = library.llama_init_from_model(model, settings)
    if not context:
        sys.exit(f"{path}: llama.cpp makes no context")
    batch = batch_of(library, ids)
    both = library.llama_model_has_encoder(model) and library.llama_model_has_decoder(model)
    if both and library.llama_encode(context, batch):
        sys.exit("the encoder failed")
    run = library.llama_encode if kind == "embeddings" else library.llama_decode
    if run(context, batch):
        sys.exit("the decoder failed")
    if kind == "embeddings":
        width, get = library.llama_model_n_embd(model), library.llama_get_embeddings_ith
    else:
        width, get = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model)), library.llama_get_logits_ith
    rows = [np.ctypeslib.as_array(get(context, i), shape=(width,)).copy() for i in range(len(ids))]
    np.save(out, np.stack(rows))


main(*sys.argv[1:])
