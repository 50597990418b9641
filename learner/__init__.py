from learner.core import Learner
from learner.stages import Callback
