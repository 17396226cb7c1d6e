"""The shop: small services that know events, and never each other.

Each is a folder: `handlers.py` (plain functions on a Service), `store.py` (its own database), `api.py` where it speaks
HTTP, `main.py` (build, wire, run). Shared are settings, the way a database is opened, the command that makes the tables
and the way HTTP is served.

How an order ends, without anybody who directs it:

    orders      order_placed ──┬──> payments    payment_captured | payment_declined
                               ├──> inventory   stock_reserved   | stock_rejected
                               └──> shipping    order_shipped, once it knows the address, the payment and the stock
    stock_rejected    ──> payments   gives captured money back: payment_refunded
    payment_declined  ──> inventory  gives reserved stock back: stock_released
    either            ──> orders     order_cancelled, with the reason

What a service writes and what it says of it are one transaction: an API's through the outbox, a handler's through
`context.transaction()`, which the inbox row belongs to as well. So a service may be killed at any moment, and its
database, too: nothing was done, or all of it, once.

The bus promises no order, and may deliver twice. Three habits make every interleaving end the same:
a handler records what it decided, by order, and an order that is asked for again gets the same answer again;
what arrives before the event that it is about is written down, not refused;
where several events complete something, the one that completed it publishes, and its name is kept beside it.
"""
