// libgomp's threads do not survive fork(): a forked child would wait for them for ever.
#pragma once

namespace bicache {

// Call before a parallel region. std::runtime_error in a child of a process that had started
// threads.
void note_threads_started();

}  // namespace bicache
