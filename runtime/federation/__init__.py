"""Train one adapter from the data of several owners: a server adds their encrypted updates and learns the sum alone.

* `protocol/`: messages and cryptography of a round, as handlers without files or network
* `recipe`, `owner`, `local`: who takes part, and how an owner trains between two messages
* `server`, `records`, `output`, `roster`: all rounds of a federation, and the files around them
* `sockets`, `flower`: ways for the messages; `launch` starts a federation as processes on one machine
* `comparison`, `report`: what a federation gains

docs/federation.md is the protocol in full.
"""
