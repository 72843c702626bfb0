from llm_training_toolkit.api import Run as Run
from llm_training_toolkit.api import SearchResult as SearchResult
from llm_training_toolkit.api import estimate as estimate
from llm_training_toolkit.api import load_batch as load_batch
from llm_training_toolkit.api import load_config as load_config
from llm_training_toolkit.api import load_model as load_model
from llm_training_toolkit.api import open_run as open_run
from llm_training_toolkit.api import plan as plan
from llm_training_toolkit.api import prepare as prepare
from llm_training_toolkit.api import train as train
from llm_training_toolkit.api import tune as tune
from llm_training_toolkit.config import Config as Config
from llm_training_toolkit.errors import Problem as Problem
from llm_training_toolkit.errors import ToolkitError as ToolkitError
from llm_training_toolkit.launch.request import TrainResult as TrainResult

__version__: str
