"""`make bench`: this bus, other clients of RabbitMQ and a C client as the limit, measured against each other.

What is compared is equally durable: a quorum queue, persistent messages, publisher confirms, manual acks, a prefetch of
300, the same payload, validated by the same model. Every program runs in processes of its own on a broker of its own,
in rounds that take turns, so that whatever else the machine does touches all of them; a figure is the rounds' median.
"""
