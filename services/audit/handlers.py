"""Writes down every event of every publisher, known to the catalogue or not."""

from eventbus import Context, Envelope, Service
from services.audit.log import AuditLog, resources
from services.settings import Settings

service = Service("audit", lifespan=lambda _: resources(Settings()))


@service.on("#")
async def write_down(envelope: Envelope, context: Context[AuditLog]) -> None:
    await context.state.append(envelope)
