#pragma once
#include <map>
#include <string>

namespace native {

extern std::map<std::string, int> launches;  // kernel -> how often it was launched

}  // namespace native
