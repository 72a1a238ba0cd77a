// Steps sequences of a server and generates beside it until it is killed:
// killed_client ADDRESS.

#include "tests/service/grpc_fixture.h"

int main(int, char** argv) {
  using namespace tenon::service;
  const auto channel = Connect(argv[1]);
  auto stub = tenon::v1::Decode::NewStub(channel);
  tenon::v1::CreateSequencesRequest request;
  tenon::v1::CreateSequencesResponse response;
  FillNew(5, 1, request.add_sequences());
  request.set_lease_ms(300);
  grpc::ClientContext context;
  if (!stub->CreateSequences(&context, request, &response).ok()) return 1;
  grpc::ClientContext stream_context;
  auto stream = stub->StepStream(&stream_context);
  for (uint64_t step = 1;; ++step) {
    tenon::v1::StepRequest next;
    tenon::v1::StepResponse reply;
    next.set_session_id(response.session_id());
    next.set_step_id(step);
    next.add_seq(response.seq(0));
    if (!stream->Write(next) || !stream->Read(&reply)) break;
  }
  for (;;) {  // the context is full: generate, again and again
    tenon::v1::GenerateRequest generate;
    tenon::v1::GenerateResponse tokens;
    FillNew(5, 1, generate.mutable_sequence());
    grpc::ClientContext generate_context;
    auto reader = stub->Generate(&generate_context, generate);
    while (reader->Read(&tokens)) {
    }
    if (!reader->Finish().ok()) return 1;
  }
}
