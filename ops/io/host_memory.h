// Large anonymous mappings: page-aligned, lazily backed, returned to the system page by page.
#pragma once

#include <cstddef>

namespace zinf::io {

constexpr size_t kHugePage = size_t{2} << 20;

// Null where the system refuses (errno tells why). With `huge_pages`, and from one huge page up, starts at a huge
// page's boundary and asks for huge pages; always starts at a page's. Pages cost memory from their first write on.
void *map_host(size_t nbytes, bool huge_pages);

void unmap_host(void *data);

// Gives the whole pages inside [data, data + nbytes) back; they read as zeros afterwards, and the addresses stay
// valid. Returns the bytes given back, or -1 if the range is not inside one mapping made by map_host.
long long release_host_pages(void *data, size_t nbytes);

} // namespace zinf::io
