"""From prompts to stored activations: looks a request up in the store, runs the model on what is missing, and writes the result.

One module per step: ``model_choice`` (which model), ``request`` (what is requested), ``options`` (how it is carried out), ``answers`` (what
answers are asked for), ``lookup`` (what the store has), ``continued`` (from which stored layer the model can go on), ``weights`` (whether
they are streamed), ``work`` (what is to be done), ``fill`` (doing it in this process), ``shares`` (cutting it for workers), ``run`` (the
steps in order), ``extract`` (the public calls), ``supply`` (activations for a probe), ``list_sites`` (what can be taken of a model),
``lens`` (what its head makes of stored rows), ``steer`` (directions that act on a model while it runs), ``watch`` (probes that score its
tokens while it runs). The inner room ``models`` is the model side, which knows no store; other rooms may import from it. Never chunks,
never fits.
"""

from lmprobe_zarr.extraction.extract import extract, plan_extract
from lmprobe_zarr.extraction.lens import logit_lens
from lmprobe_zarr.extraction.list_sites import list_sites
from lmprobe_zarr.extraction.model_choice import ModelChoice
from lmprobe_zarr.extraction.models import ENGINES
from lmprobe_zarr.extraction.options import WEIGHTS
from lmprobe_zarr.extraction.plan import ExtractPlan, ExtractStats
from lmprobe_zarr.extraction.steer import steer
from lmprobe_zarr.extraction.supply import Activations, Supplied, Supply, SupplyMemory
from lmprobe_zarr.extraction.watch import Callback, Watch, watch

__all__ = [
    "ENGINES",
    "WEIGHTS",
    "Activations",
    "Callback",
    "ExtractPlan",
    "ExtractStats",
    "ModelChoice",
    "Supplied",
    "Supply",
    "SupplyMemory",
    "Watch",
    "extract",
    "list_sites",
    "logit_lens",
    "plan_extract",
    "steer",
    "watch",
]
