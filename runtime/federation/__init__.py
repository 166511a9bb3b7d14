"""Several data owners train one adapter: a server adds their encrypted updates and learns the sum alone.

`settings` what all agree on; `layout` and `pruning` which coordinates travel; `shamir`, `channels` and `keyring` the keys;
`messages`, `client` and `server` the round as pure handlers; `local` the training in between; `sockets`, `launch` and
`flower` carry the messages. docs/federation.md is the protocol in full.
"""
