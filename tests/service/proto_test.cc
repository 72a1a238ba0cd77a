// decode.proto only ever grows. decode_v1.golden has what was once published,
// a line each: nothing of it may go or change, and what is new is appended to
// it when kProtocolMinor is raised.

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <string>

#include "service/proto/decode.pb.h"

namespace tenon::service {
namespace {

using google::protobuf::FieldDescriptor;

void AddMessage(const google::protobuf::Descriptor& message,
                std::set<std::string>* lines) {
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    std::string type = field.type_name();
    if (field.message_type() != nullptr) type = field.message_type()->name();
    if (field.enum_type() != nullptr) type = field.enum_type()->name();
    const char* label = field.is_repeated()    ? "repeated "
                        : field.has_presence() ? "optional "
                                               : "";
    lines->insert(message.name() + "." + field.name() + " = " +
                  std::to_string(field.number()) + " " + label + type);
  }
}

std::set<std::string> CurrentLines() {
  std::set<std::string> lines;
  const auto& file = *v1::StepRequest::descriptor()->file();
  for (int i = 0; i < file.message_type_count(); ++i) {
    AddMessage(*file.message_type(i), &lines);
  }
  for (int i = 0; i < file.enum_type_count(); ++i) {
    const auto& values = *file.enum_type(i);
    for (int j = 0; j < values.value_count(); ++j) {
      lines.insert(values.value(j)->name() + " = " +
                   std::to_string(values.value(j)->number()));
    }
  }
  for (int i = 0; i < file.service_count(); ++i) {
    const auto& service = *file.service(i);
    for (int j = 0; j < service.method_count(); ++j) {
      const auto& method = *service.method(j);
      lines.insert("rpc " + method.full_name() + "(" +
                   (method.client_streaming() ? "stream " : "") +
                   method.input_type()->name() + ") " +
                   (method.server_streaming() ? "stream " : "") +
                   method.output_type()->name());
    }
  }
  return lines;
}

TEST(ProtoTest, NothingThatWasPublishedChanged) {
  std::ifstream file("tests/service/decode_v1.golden");
  std::set<std::string> golden;
  for (std::string line; std::getline(file, line);) golden.insert(line);
  const std::set<std::string> current = CurrentLines();
  for (const std::string& line : golden) {
    EXPECT_EQ(current.count(line), 1u) << "gone or changed: " << line;
  }
  for (const std::string& line : current) {
    EXPECT_EQ(golden.count(line), 1u) << "new, for decode_v1.golden: " << line;
  }
}

void AddTypes(const google::protobuf::Descriptor& message,
              std::set<FieldDescriptor::Type>* types) {
  for (int i = 0; i < message.field_count(); ++i) {
    types->insert(message.field(i)->type());
    if (message.field(i)->message_type() != nullptr) {
      AddTypes(*message.field(i)->message_type(), types);
    }
  }
}

// Shared memory was opened by a name that a client had sent, and pointers and
// strides came from the wire. Here nothing comes that could be one.
TEST(ProtoTest, Cve202523319AndGgmlRpc1103_RequestsHaveNumbersAlone) {
  std::set<FieldDescriptor::Type> types;
  const auto& file = *v1::StepRequest::descriptor()->file();
  for (int i = 0; i < file.service_count(); ++i) {
    for (int j = 0; j < file.service(i)->method_count(); ++j) {
      AddTypes(*file.service(i)->method(j)->input_type(), &types);
    }
  }
  EXPECT_EQ(types.count(FieldDescriptor::TYPE_STRING), 0u);
  EXPECT_EQ(types.count(FieldDescriptor::TYPE_BYTES), 0u);
  EXPECT_EQ(types.count(FieldDescriptor::TYPE_FIXED64), 1u) << "handles";
}

// What a newer client sends and this server does not know survives.
TEST(ProtoTest, UnknownFieldsAreKept) {
  v1::StepRequest request;
  request.set_step_id(7);
  std::string bytes = request.SerializeAsString();
  const std::string unknown("\xf8\x3f\x05", 3);  // field 1023
  bytes += unknown;
  v1::StepRequest parsed;
  ASSERT_TRUE(parsed.ParseFromString(bytes));
  EXPECT_EQ(parsed.step_id(), 7u);
  EXPECT_EQ(parsed.SerializeAsString(), bytes);
}

}  // namespace
}  // namespace tenon::service
