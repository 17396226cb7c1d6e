"""What OpenTelemetry tells: which event belongs to whom, and one order's whole way as a tree."""

from collections.abc import Callable, Iterator

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import SpanKind, StatusCode
from rich.text import Text
from rich.tree import Tree

from services.demo.ledger import PUBLISHERS


class Tracing(SpanProcessor):
    """Keeps every span. *on_published* is called with an event's name once the broker has confirmed it."""

    def __init__(self, on_published: Callable[[str], None]) -> None:
        self._on_published = on_published
        self._spans: list[ReadableSpan] = []
        self._trace_of: dict[str, int] = {}  # by event id
        self._first_of: dict[int, str] = {}  # by trace: the event that it began with

    def install(self) -> None:
        """Once per process, before anything connects: who is connected already records nothing."""
        provider = TracerProvider(sampler=ALWAYS_ON, resource=Resource.get_empty(), shutdown_on_exit=False)
        provider.add_span_processor(self)
        trace.set_tracer_provider(provider)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        context = span.get_span_context()
        if span.kind is SpanKind.PRODUCER and context is not None:
            event_id = _said(span, "messaging.message.id")
            self._trace_of[event_id] = context.trace_id
            self._first_of.setdefault(context.trace_id, event_id)

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)
        if span.kind is SpanKind.PRODUCER and span.status.status_code is not StatusCode.ERROR:
            self._on_published(_event(span))

    def origin(self, event_id: str) -> str:
        """The id of the event that *event_id* followed from, in the end."""
        return self._first_of.get(self._trace_of.get(event_id, 0), event_id)

    def tree(self, event_id: str) -> Tree:
        """All that followed from the event *event_id*."""
        trace_id = self._trace_of[event_id]
        mine = [span for span in self._spans if span.context is not None and span.context.trace_id == trace_id]
        mine.sort(key=lambda span: span.start_time or 0)
        children: dict[int | None, list[ReadableSpan]] = {}
        for span in mine:
            children.setdefault(span.parent.span_id if span.parent else None, []).append(span)
        root = Tree("", hide_root=True)
        _grow(root, None, children)
        return root


def _grow(tree: Tree, parent: int | None, children: dict[int | None, list[ReadableSpan]]) -> None:
    for span in children.get(parent, []):
        assert span.context is not None
        # What a web framework tells of its own inside is no part of the story; what is below it is.
        branch = tree if span.kind is SpanKind.INTERNAL else tree.add(_label(span))
        _grow(branch, span.context.span_id, children)


def _label(span: ReadableSpan) -> Text:
    took_ms = ((span.end_time or 0) - (span.start_time or 0)) / 1e6
    took = f"  {took_ms:.0f} ms"
    match span.kind:
        case SpanKind.PRODUCER:
            event = _event(span)
            return Text.assemble((event, "bold"), f"  published by {PUBLISHERS[event]}, confirmed in", (took, "cyan"))
        case SpanKind.CONSUMER:
            return Text.assemble(" ".join(_handling(span)), (took, "cyan"))
        case _:  # the request, where the web framework traces requests
            return Text.assemble(span.name, (took, "cyan"))


def _handling(span: ReadableSpan) -> Iterator[str]:
    queue = _said(span, "messaging.destination.name").rpartition(":")[2]
    yield f"{queue.split('.')[1]}.{_said(span, 'eventbus.handler')}"
    if (attempt := _said(span, "eventbus.attempt")) != "1":
        yield f"attempt {attempt}"
    if span.status.status_code is StatusCode.ERROR:
        yield span.status.description or "failed"


def _event(span: ReadableSpan) -> str:
    return _said(span, "messaging.rabbitmq.destination.routing_key").rpartition(".v")[0]


def _said(span: ReadableSpan, attribute: str) -> str:
    return str((span.attributes or {}).get(attribute, ""))
