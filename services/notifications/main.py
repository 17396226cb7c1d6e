"""`python -m services.notifications.main`, or `eventbus run services.notifications.main:service`."""

from eventbus import run
from services.notifications.handlers import service

if __name__ == "__main__":
    run(service)
