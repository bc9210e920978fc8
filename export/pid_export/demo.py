"""The main job on a small decoder, as `make demo` runs it: export, verify, decode.

Its weights are random, so the picture is a texture, not a photograph: what the demo shows is that
every part works on this machine. Takes about a minute and leaves everything in demo/.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pid_export import cli, verify_cli
from pid_runtime import decode_cli

CONFIG = {
    "hidden_size": 256,
    "num_heads": 4,
    "patch_depth": 4,
    "pixel_attn_size": 288,
    "pixel_num_heads": 4,
    "text_dim": 256,
    "text_max_length": 32,
    "latent_hidden": 64,
}
"""A v1 decoder of FLUX latents with the released head sizes and a thousandth of the work."""


def main(folder: Path = Path("demo")) -> int:
    """Run the demo in `folder`; returns the first exit code that is not 0."""
    folder.mkdir(exist_ok=True)
    bundle, image = folder / "bundle", folder / "image.png"
    shutil.rmtree(bundle, ignore_errors=True)
    config, latent = folder / "config.json", folder / "latent.safetensors"
    config.write_text(json.dumps(CONFIG, indent=1))
    rng = np.random.default_rng(0)
    save_file(
        {
            "latent": rng.standard_normal((1, 16, 16, 24), np.float32),
            "caption": rng.standard_normal((1, 32, 256), np.float32),
        },
        latent,
    )
    export = ["--config", str(config), "--random-weights", "0", "--buckets", "preview=2048"]
    commands: tuple[tuple[str, Callable[[Sequence[str]], int], list[str]], ...] = (
        ("pid-export", cli.main, [*export, "-o", str(bundle)]),
        ("pid-verify", verify_cli.main, [str(bundle), "--backend", "onnxruntime"]),
        ("pid-decode", decode_cli.main, _decode(bundle, latent, image)),
    )
    for name, command, arguments in commands:
        sys.stderr.write(f"\n$ {name} {' '.join(arguments)}\n")
        code = command(arguments)
        if code:
            return code
    return 0


def _decode(bundle: Path, latent: Path, image: Path) -> list[str]:
    return [str(bundle), "--latent", str(latent), "--seed", "0", "--overwrite", "-o", str(image)]


if __name__ == "__main__":
    sys.exit(main())
