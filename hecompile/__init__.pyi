from hecompile.api import (
    Build as Build,
)
from hecompile.api import (
    CompileOptions as CompileOptions,
)
from hecompile.api import (
    Costs as Costs,
)
from hecompile.api import (
    Lora as Lora,
)
from hecompile.api import (
    Offload as Offload,
)
from hecompile.api import (
    PrivacySpent as PrivacySpent,
)
from hecompile.api import (
    Reply as Reply,
)
from hecompile.api import (
    RoundRecord as RoundRecord,
)
from hecompile.api import (
    Session as Session,
)
from hecompile.api import (
    TrainingResult as TrainingResult,
)
from hecompile.api import (
    export as export,
)
from hecompile.api import (
    federate as federate,
)
from hecompile.api import (
    load as load,
)
from hecompile.api import (
    offload as offload,
)
from hecompile.api import (
    privacy_spent as privacy_spent,
)
from hecompile.api import (
    train as train,
)
from hecompile.errors import (
    FederationError as FederationError,
)
from hecompile.errors import (
    HecompileError as HecompileError,
)
from hecompile.errors import (
    InputError as InputError,
)
from hecompile.errors import (
    PrivacyError as PrivacyError,
)
from hecompile.errors import (
    SecurityError as SecurityError,
)
from hecompile.errors import (
    VerificationError as VerificationError,
)
from hecompile.errors import (
    WorkerError as WorkerError,
)

__version__: str
