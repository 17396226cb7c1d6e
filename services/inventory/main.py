"""`python -m services.inventory.main`, or `eventbus run services.inventory.main:service`."""

from eventbus import run
from services.inventory.handlers import service

if __name__ == "__main__":
    run(service)
