"""Steps four continuations of a prompt together, from Python.

  ./bazelw run //service:tenon_server &
  ./bazelw run //examples/grpc_client:client_py -- "It was a truth"

Needs Debian's python3-grpcio. The same seed gives the same text.
"""

import argparse
import os
import sys
import time

import grpc

from service.proto import decode_pb2
from service.proto import decode_pb2_grpc


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default=f"unix:/tmp/tenon-{os.getuid()}.sock")
    parser.add_argument("--token", help="bearer token")
    parser.add_argument("--ca", help="PEM file of the server's authority: TLS")
    parser.add_argument("--cert", help="PEM file of an own certificate")
    parser.add_argument("--key", help="PEM file of its key")
    parser.add_argument("--count", type=int, default=4, help="of continuations")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("prompt", nargs="?", default="It was a truth")
    arguments = parser.parse_args()
    if bool(arguments.cert) != bool(arguments.key):
        parser.error("--cert and --key are given together")
    if arguments.cert and not arguments.ca:
        parser.error("--cert is given with --ca")
    return arguments


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        sys.exit(f"client: {error}")


def connect(arguments):
    if not arguments.ca:
        return grpc.insecure_channel(arguments.target)
    own = [read(path) for path in (arguments.key, arguments.cert) if path]
    return grpc.secure_channel(
        arguments.target, grpc.ssl_channel_credentials(read(arguments.ca), *own)
    )


def create(stub, arguments, metadata):
    request = decode_pb2.CreateSequencesRequest()
    for i in range(arguments.count):
        sequence = request.sequences.add(
            prompt=arguments.prompt.encode(), max_tokens=arguments.max_tokens
        )
        sequence.sampling.temperature = 0.8
        sequence.sampling.seed = arguments.seed + i
    return stub.CreateSequences(request, timeout=60, metadata=metadata)


def step(stub, request, metadata):
    """A step, sent again until it is answered: it takes effect once."""
    while True:
        try:
            return stub.Step(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            again = (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            if error.code() not in again:
                raise
            time.sleep(0.02)


def generate(stub, arguments, metadata):
    created = create(stub, arguments, metadata)
    text = [bytearray([token]) for token in created.token]
    alive = {
        handle: i
        for i, handle in enumerate(created.seq)
        if created.row_status[i] == decode_pb2.ROW_STATUS_OK
    }
    step_id = 0
    while alive:
        step_id += 1
        request = decode_pb2.StepRequest(
            session_id=created.session_id, step_id=step_id, seq=list(alive)
        )
        reply = step(stub, request, metadata)
        for handle, token, status in zip(request.seq, reply.token, reply.row_status):
            text[alive[handle]].append(token)
            if status != decode_pb2.ROW_STATUS_OK:
                del alive[handle]
        print(f"\rstep {step_id}, {len(alive)} alive ", end="", file=sys.stderr)
    print(file=sys.stderr)
    stub.ReleaseSequences(
        decode_pb2.ReleaseSequencesRequest(
            session_id=created.session_id, end_session=True
        ),
        timeout=10,
        metadata=metadata,
    )
    return text


def main():
    arguments = parse_arguments()
    metadata = []
    if arguments.token:
        metadata.append(("authorization", "Bearer " + arguments.token))
    with connect(arguments) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=30)
        except grpc.FutureTimeoutError:
            sys.exit(f"client: no connection to {arguments.target}")
        stub = decode_pb2_grpc.DecodeStub(channel)
        for i, text in enumerate(generate(stub, arguments, metadata)):
            print(f"--- {i}\n{arguments.prompt}{text.decode(errors='replace')}")


if __name__ == "__main__":
    main()
