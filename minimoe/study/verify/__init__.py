"""What `minimoe verify` does: reads everything in a run's or a model's folder, changes nothing, and says of each thing whether it is whole.

checks     what a check finds, and numbers that are not finite      checkpoint   one checkpoint
run        a run's folder and its checkpoints                       folder       a model folder as transformers opens it
"""

from minimoe.study.verify.checks import Check as Check
from minimoe.study.verify.verify import Verification as Verification
from minimoe.study.verify.verify import verify as verify
