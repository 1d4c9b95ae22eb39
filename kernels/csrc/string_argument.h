// A str argument of an op. The stable ABI's own conversion to std::string leaks a copy per call, so
// the handle is taken as it is and released here.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace bert_fast {

using String = StringHandle;

inline std::string take(String handle) {
  size_t length = 0;
  const char* data = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &data);
  std::string text(data, length);
  torch_delete_string(handle);
  return text;
}

}  // namespace bert_fast
