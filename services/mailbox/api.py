"""The mailbox over HTTP: GET and DELETE /mails, POST /refuse, GET /health."""

from fastapi import FastAPI
from pydantic import BaseModel, Field

from services.mailbox.server import Mail, Mailbox


class Refusal(BaseModel):
    """How many of the next deliveries are refused with 451, and how many have been so far."""

    count: int = Field(ge=0)
    refused: int = 0


def create_app(mailbox: Mailbox) -> FastAPI:
    """The app on *mailbox*, which an SMTP server fills."""
    app = FastAPI(title="mailbox")

    @app.get("/mails")
    async def mails(to: str | None = None, event_id: str | None = None) -> list[Mail]:
        return [
            mail
            for mail in mailbox.mails
            if (to is None or to in mail.recipients) and (event_id is None or event_id == mail.event_id)
        ]

    @app.delete("/mails", status_code=204)
    async def throw_away() -> None:
        mailbox.mails.clear()

    @app.get("/refuse")
    async def refusing() -> Refusal:
        return Refusal(count=mailbox.refuse, refused=mailbox.refused)

    @app.post("/refuse")
    async def refuse(refusal: Refusal) -> Refusal:
        mailbox.refuse = refusal.count
        return Refusal(count=mailbox.refuse, refused=mailbox.refused)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app
