"""`ziggurat.lowrank` without the package's own __init__, which imports PEFT: the kernels need torch and Triton only."""

import sys
import types
from pathlib import Path

package = types.ModuleType("ziggurat")
package.__path__ = [str(Path(__file__).resolve().parents[2] / "src" / "ziggurat")]
sys.modules.setdefault("ziggurat", package)

from ziggurat.lowrank import mask as masks  # noqa: E402
from ziggurat.lowrank import plain_product, product, triton_product  # noqa: E402

__all__ = ["masks", "plain_product", "product", "triton_product"]
