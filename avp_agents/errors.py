"""Every failure a caller can meet. Each class names one situation; each message says what to do about it.

AvpError
├── ConfigurationError        an option is unknown, out of range, or contradicts another
│   └── GrammarError              a grammar or JSON schema is malformed, or cannot be enforced
├── PromptError               a prompt cannot be rendered (no template, media content, unknown role)
├── ContextWindowError        prompt, context and requested positions exceed the model's window
├── ModelError
│   ├── ModelNotFoundError        no source has the weights
│   ├── UnsupportedModelError     the architecture cannot be represented exactly
│   └── FingerprintMismatchError  a context belongs to other weights
├── EngineError
│   ├── EngineBusyError           the request queue is full
│   ├── EngineClosedError         the engine was closed, or belongs to the parent of a fork
│   ├── KvMemoryError             the KV pool cannot hold the request at all
│   ├── RequestTimeoutError       a request ran out of its time
│   ├── RequestCancelledError     a request was cancelled by its caller
│   └── NumericalError            NaN or Inf came out of the model
├── ProtocolError
│   ├── FrameError                bytes are not a frame: torn, surplus, contradictory, or of an unknown version
│   │   ├── FrameLimitError           a frame is larger than the receiver's limits
│   │   └── FrameIntegrityError       a frame's bytes do not match their MAC or checksum
│   ├── ForeignMessageError       a message of the reference SDK is malformed, or one side cannot represent it exactly
│   ├── HandshakeError            a hello is not well formed, or two sides have no handoff mode in common
│   ├── SessionError              a session is unknown, expired or another tenant's
│   └── ProjectionError           what one model expressed for another cannot be read, or not be made
├── TransportError            a server cannot be reached, or what came over the network makes no sense
│   ├── AuthenticationError       no token, or one that the server does not know
│   └── LimitExceededError        a request is larger, or comes faster, than the server allows
└── StoreError
    ├── NotStoredError            the context was never put into a store
    ├── InvalidHandleError        a handle is not well formed, or belongs to another scope
    ├── ContextLostError          no tier holds the context any more
    ├── IntegrityError            stored bytes do not match their MAC
    ├── NamespaceKeyError         the namespace's key is missing, malformed or readable by others
    ├── EncryptionKeyError        an encryption key is missing or malformed, or not the one that data was encrypted with
    ├── StoreUnavailableError     the server behind a store does not answer, or refuses
    └── StoreFullError            pinned contexts leave no room under the budget
"""


class AvpError(Exception):
    """Base of all errors that avp-agents raises on purpose."""


class ConfigurationError(AvpError, ValueError):
    """An option is unknown, out of range, or contradicts another one."""


class GrammarError(ConfigurationError):
    """A grammar or JSON schema is malformed, or asks for more than constrained decoding can enforce."""


class PromptError(AvpError, ValueError):
    """The prompt cannot be rendered with the model's chat template."""


class ContextWindowError(AvpError, ValueError):
    """The request needs more positions than the model's context window has.

    Args:
        window: Positions the model supports.
        context: Positions inherited from a context.
        prompt: Positions of the rendered prompt.
        requested: Latent steps plus tokens to generate.
    """

    def __init__(self, *, window: int, context: int, prompt: int, requested: int) -> None:
        self.window, self.context, self.prompt, self.requested = window, context, prompt, requested
        super().__init__(
            f"{context} context + {prompt} prompt + {requested} requested = {context + prompt + requested} positions, "
            f"but the model's window is {window}. Lower max_tokens or steps, or shorten the prompt or context."
        )


class ModelError(AvpError):
    """The model cannot be found, loaded or used."""


class ModelNotFoundError(ModelError):
    """No source (folder, cache, hub, package) has the weights."""


class UnsupportedModelError(ModelError):
    """The engine cannot represent this architecture exactly, so it refuses to load it."""


class FingerprintMismatchError(ModelError):
    """A context was made by other weights (or another dtype) than this engine's."""


class EngineError(AvpError):
    """The engine could not carry out a request."""


class EngineBusyError(EngineError):
    """The request queue is full; try again later or raise `max_queue`."""


class EngineClosedError(EngineError):
    """The engine was closed, or this process is a fork of the one that owns it."""


class KvMemoryError(EngineError):
    """The KV pool is too small for the request even when everything else is evicted."""


class RequestTimeoutError(EngineError, TimeoutError):
    """The request did not finish within its timeout."""


class RequestCancelledError(EngineError):
    """The request was cancelled by its caller."""


class NumericalError(EngineError, ArithmeticError):
    """NaN or Inf came out of the model."""


class ProtocolError(AvpError):
    """Two engines could not hand a context over."""


class FrameError(ProtocolError, ValueError):
    """Bytes are not a frame: torn, with bytes left over, contradictory, or of an unknown version or kind."""


class FrameLimitError(FrameError):
    """A frame is larger than the receiver's limits allow."""


class FrameIntegrityError(FrameError):
    """A frame's bytes do not match their MAC or checksum: another key, another sender, or damage on the way."""


class ForeignMessageError(ProtocolError, ValueError):
    """A message of the reference SDK is malformed, or one of the two sides cannot represent it exactly."""


class HandshakeError(ProtocolError, ValueError):
    """A hello is not well formed, or the two sides have no handoff mode in common."""


class SessionError(ProtocolError, LookupError):
    """The session is unknown, has expired, or belongs to another tenant."""


class ProjectionError(ProtocolError, ValueError):
    """What one model expressed for another cannot be read, or the context has nothing to express."""


class TransportError(AvpError):
    """A server cannot be reached, or what came over the network makes no sense."""


class AuthenticationError(TransportError):
    """There is no token, or it is one that the server does not know; or the request comes from another site."""


class LimitExceededError(TransportError):
    """A request is larger, or comes faster, than the server allows."""


class StoreError(AvpError):
    """A context store could not do what was asked."""


class NotStoredError(StoreError):
    """The context was never put into a store, so it has no handle."""


class InvalidHandleError(StoreError, ValueError):
    """The handle is not well formed, or was minted for another scope."""


class ContextLostError(StoreError, LookupError):
    """No tier holds the context any more."""


class IntegrityError(StoreError):
    """Stored bytes are torn or altered: they do not match their MAC."""


class NamespaceKeyError(StoreError):
    """The namespace's key is missing, malformed, or readable by other users."""


class EncryptionKeyError(StoreError):
    """The encryption key is missing or malformed, or not the one that the stored data was encrypted with."""


class StoreUnavailableError(StoreError):
    """The server behind a store does not answer in time, or refuses."""


class StoreFullError(StoreError):
    """Pinned contexts leave no room under the store's byte budget."""
