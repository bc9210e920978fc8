"""Asks a Triton server over HTTP and gRPC, in a Python of its own: it has tritonclient.

python triton_client.py HTTP_PORT GRPC_PORT LATENT.npy RESULT.npz: the images, and what was refused.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

import sys
import threading

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

MODEL = "golden"


def infer(module, client, latent, **others):
    given = []
    arrays = {"latent": latent, **{name: np.array([[each]]) for name, each in others.items()}}
    for name, kind in (("sigma", np.float32), ("seed", np.uint64), ("steps", np.int32)):
        if name in arrays:
            arrays[name] = arrays[name].astype(kind)
    for name, array in arrays.items():
        tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        given.append(tensor)
    return client.infer(MODEL, given, priority=1).as_numpy("image")


def refused(module, client, latent, **others):
    try:
        infer(module, client, latent, **others)
    except InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return "accepted"


def main(http_port, grpc_port, latent_file, result_file):
    latent = np.load(latent_file)
    http = tritonclient.http.InferenceServerClient(f"127.0.0.1:{http_port}")
    grpc = tritonclient.grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")
    found = {}
    for kind, module, client in (
        ("http", tritonclient.http, http),
        ("grpc", tritonclient.grpc, grpc),
    ):
        found[f"{kind}_image"] = infer(module, client, latent, sigma=0.2, seed=7, steps=2)
        found[f"{kind}_refused"] = np.array(
            [
                refused(module, client, latent[:, :3]),
                refused(module, client, latent * np.nan),
                refused(module, client, latent, steps=3),
                refused(module, client, latent, sigma=3),
            ]
        )
    images = [None] * 8

    def ask(seed):
        images[seed] = infer(tritonclient.grpc, grpc, latent, seed=seed)

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["many"] = np.concatenate(images)  # pyright: ignore
    http.unload_model(MODEL)
    unloaded = not http.is_model_ready(MODEL)
    http.load_model(MODEL)
    found["reloaded"] = np.array([unloaded, http.is_model_ready(MODEL)])
    found["again"] = infer(tritonclient.http, http, latent, sigma=0.2, seed=7, steps=2)
    np.savez(result_file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
