# The public names, each with its module. They are loaded when first used: `oocpatch --help` does not wait for torch.
from .aggregation.aggregator import PatchAggregator as PatchAggregator
from .conversion.convert import convert as convert
from .errors import BlockFailed as BlockFailed
from .errors import ClusterLost as ClusterLost
from .errors import CorruptData as CorruptData
from .errors import OocpatchError as OocpatchError
from .errors import OutputBusy as OutputBusy
from .errors import OutputExists as OutputExists
from .errors import PlanTooLarge as PlanTooLarge
from .errors import RunMismatch as RunMismatch
from .models.wrappers import NumpyModel as NumpyModel
from .planning.grid import PatchGrid as PatchGrid
from .planning.grid import PatchLocation as PatchLocation
from .planning.plan import Plan as Plan
from .progress import TaskDone as TaskDone
from .run.predict import PlannedRun as PlannedRun
from .run.predict import plan as plan
from .run.predict import predict as predict
from .run.status import RunStatus as RunStatus
from .run.status import status as status
from .sampling.grid_sampler import GridSampler as GridSampler
from .sampling.loader import SubjectsLoader as SubjectsLoader
from .sampling.queue import Queue as Queue
from .sampling.subject import Subject as Subject
from .sampling.uniform import UniformSampler as UniformSampler
from .sampling.weighted import LabelSampler as LabelSampler
from .sampling.weighted import WeightedSampler as WeightedSampler
from .verification.checksums import Damage as Damage
from .verification.checksums import Verification as Verification
from .verification.checksums import verify as verify
from .verification.compare import CheckReport as CheckReport
from .verification.compare import check as check
from .visualization.html_report import report as report
from .visualization.picture import view as view
from .volumes.volume import Volume as Volume

__version__: str
